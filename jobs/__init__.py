"""What `ray job submit` runs; each file reads top to bottom as the recipe of one study.

Importing this package checks that the Python which runs the job is one that has the packages: a job started by its
shebang line gets the first ``python3`` of the cluster's PATH, which is often the system's.
"""

import importlib.util
import sys

_missing = [name for name in ("torch", "ray", "mlflow", "tokenizers") if importlib.util.find_spec(name) is None]
if sys.version_info < (3, 11) or _missing:
    print(
        f"error: the job runs with {sys.executable} (Python {sys.version.split()[0]}), which lacks "
        f"{', '.join(_missing) or 'Python 3.11'}: start the Ray head from the project's environment "
        "(`. .venv/bin/activate`), or submit `PATH/TO/.venv/bin/python jobs/...`",
        file=sys.stderr,
    )
    raise SystemExit(2)
