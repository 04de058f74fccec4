"""Python imports this at its start where the folder is on PYTHONPATH: a process that is meant to die is armed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from deadly import arm_from_environment

sys.path.pop(0)
arm_from_environment()
