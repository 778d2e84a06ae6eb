"""Names of studies: they stand in search filters, folders and addresses."""

import re

from hrs.errors import HRSError, shown

_STUDY = re.compile(r"\w[\w.+-]{0,99}")


def require_study_name(name: str) -> None:
    """Raise HRSError for a name that no study may have."""
    if not _STUDY.fullmatch(name):
        raise HRSError(f"study name {shown(name)} must be at most 100 letters, digits, '_', '.', '+' or '-'")
