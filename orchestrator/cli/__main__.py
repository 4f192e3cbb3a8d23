"""`python -m orchestrator.cli` is `orchestrator`."""

import sys

from orchestrator.cli.main import main

sys.exit(main())
