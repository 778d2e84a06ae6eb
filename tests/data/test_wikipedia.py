"""From MediaWiki markup to prose."""

import pytest

from hrs.data.wikipedia import plain_text


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("'''Bold''' and ''italic'' [[link]]s to [[page (x)|a page]].", "Bold and italic links to a page."),
        ("A fact.<ref>Smith {{p|2}}</ref> Another<ref name=a/>.", "A fact. Another."),
        ("Before\n{| class=x\n|-\n| cell\n|}\nafter", "Before\n\nafter"),
        ("[[File:a.jpg|thumb|A [[nested]] caption]]Text [[Category:X]][[de:Seite]]", "Text"),
        ("Al-Kindi ({{lang|ar|x}}, c. 801) and ({{ipa}}) rest", "Al-Kindi (c. 801) and rest"),
        ("H<sub>2</sub>O &ndash; at 5&nbsp;km<!-- hidden -->", "H2O \u2013 at 5 km"),
        ("[http://x.org A site] and [http://y.org]", "A site and"),
        (
            "Intro\n\n== History ==\nOld.\n\n== See also ==\n* [[Other]]\n\n== Legacy ==\nNew.",
            "Intro\n\nHistory\n\nOld.\n\nLegacy\n\nNew.",
        ),
        (
            "Two <ref>unclosed {{cite</ref> [[links and ''quotes\n{| open\n! head\n| cell\ntext",
            "Two links and quotes\n\ntext",
        ),
        ("Body\n==References==\n{{reflist}}\n=== Notes ===\nnote\n== External links ==\n* [http://x.org X]", "Body"),
    ],
)
def test_markup_becomes_prose(wikitext: str, text: str) -> None:
    assert plain_text(wikitext) == text
