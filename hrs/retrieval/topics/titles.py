"""Automatic titles: the most frequent words of a text that are not in every text."""

import re
from collections.abc import Mapping

TITLE_WORDS = 4
_WORD = re.compile(r"[^\W\d_]{3,}")

_STOP_WORDS = """
about above across after again against all almost along already also although always among and another any
anyone anything are aren around away back because been before being below best better between both but can
cannot come comes could couldn did didn does doesn doing don done down during each either else enough even ever
every everything few find first for from gave get gets give given gives going good got great had hadn has hasn
have haven having her here hers herself him himself his how however into isn its itself just keep know known
last later least less let like long look made make makes making many may maybe might mine more most much must
myself near need needs neither never new next nor not nothing now off often old once one only onto other others
ought our ours ourselves out over own part perhaps please put quite rather really said same say says see seem
seems seen shall she should shouldn show since some someone something soon still such sure take taken takes tell
than thank thanks that the their theirs them themselves then there these they thing things think this those
though three through thus time together told too toward towards two under until upon use used uses using very
want wants was wasn way well went were weren what whatever when where whether which while who whole whom whose
why will with within without won would wouldn yes yet you your yours yourself yourselves
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


def content_words(text: str) -> list[str]:
    """Words of three letters or more in lower case, without stop words."""
    return [word for word in _WORD.findall(text.lower()) if word not in STOP_WORDS]


def title_of(counts: Mapping[str, int]) -> str:
    """The four most frequent words, ``tide / harbour / sail / anchor``; of equals the one that was counted first. Empty
    without words."""
    return " / ".join(sorted(counts, key=lambda word: -counts[word])[:TITLE_WORDS])
