"""Penn Treebank tokens of captions without Java.

COCO's scores are computed on the tokens of Stanford's PTBTokenizer (CoreNLP 3.4.1, `-preserveLines -lowerCase`) without
the punctuation that pycocoevalcap lists. The rules below were written from the documented Penn Treebank conventions and
from what that program prints. Not covered: most smileys, telephone numbers with spaces, scripts that use no spaces.
"""

import re

# pycocoevalcap/tokenizer/ptbtokenizer.py:21, and the plain quote. Lower-cased brackets are not in that list: they stay.
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", '"', "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
LINE_BREAKS = re.compile("[\r\n\x0b\x0c\x1c-\x1e\x85\u2028\u2029]+")
NO_BREAK_SPACE = "\u00a0"  # stands for the space inside a token: "1 1/2"

_MARKS = str.maketrans({"‘": " ' ", "“": '"', "”": '"', "–": "--", "—": "--", "…": "...", "\u200b": " ", "\ufeff": " "})
_ESCAPES = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_ESCAPES |= {"£": "#", "€": "$", "¤": "$", "¢": "cents", "½": "1/2", "¼": "1/4", "¾": "3/4", "``": "''"}
_ESCAPES |= {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'", "&nbsp;": "''"}

# Abbreviations that keep their period: anywhere; only with a capital; only before a number.
_ABBREVIATIONS = (
    "adj|adm|adv|al|ala|alex|approx|apr|ariz|assn|assoc|asst|atty|attys|aug|ave|bancorp|bhd|bldg|"
    "blvd|brig|bros|capt|cf|cie|cmdr|co|col|colo|comdr|conn|corp|cos|cpl|ct|dak|dec|dept|det|dr|"
    "drs|elec|ens|esq|est|etc|ext|feb|fla|fri|ft|ga|gen|gov|govs|hon|inc|ind|insp|intl|invt|jan|"
    "jos|jr|jul|jun|kan|kans|ky|lieut|lt|ltd|maj|mar|md|messrs|mfg|mich|minn|mlle|mme|mo|mon|"
    "mont|mr|mrs|ms|msgr|mt|mtg|natl|neb|nev|nov|oct|okla|penn|pfc|ph|plc|ppte|ppty|pres|prof|"
    "profs|pte|ptes|pty|ptys|pvt|rd|rep|reps|rev|rt|sen|sens|sep|sept|seq|sfc|sgt|spc|sq|sr|st|"
    "ste|supt|supts|sys|tel|tenn|thu|tue|tues|univ|va|vs|vt|wed|wis|wisc|wm|wyo"
)
_CAPITALISED = "Ark|Az|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
_BEFORE_NUMBER = "art|ca|figs?|nos?|op|pp|prop"
# Words that, with a capital, start the next sentence: "sign b. The" is "b", "." and "the".
_STARTERS = (
    "A|About|According|Additionally|After|An|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last|Many|More|Now|Once|"
    "One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|What|When|While|Yet|You"
)

_NOT_WORD = r"_²³¹¼½¾\U00010000-\U0010ffff"
_L = rf"[^\W\d{_NOT_WORD}]"  # a letter
_A = rf"[^\W{_NOT_WORD}]"  # a letter or digit
_NUMBER = r"[+-]?(?:\d*(?:[.,:]\d+)+|\d+)"
_CLITIC = rf"(?i:'(?:s|m|d|re|ve|ll)(?!{_A})|’(?:s|m|d|re|ve|ll))"
_CURLY = re.compile("(?i:’(?:s|m|d|re|ve|ll)|n’t)")

# The first alternative that matches wins, so order matters.
_TOKEN = re.compile(
    rf"""
    (?P<line>\n)
  | (?!(?i:cannot|gonna|wanna|gotta|gimme|lemme)[ \n])[A-Za-z]+(?=[ \n])  # nearly every word: first, for speed
  | </?[A-Za-z!][^<>\n]*> | &(?:amp|lt|gt|quot|apos|nbsp);                # a tag; an entity
  | https?://[^\s"<>]+[^\s"<>.,!?)] | [\w.+-]+@\w(?:[\w.-]*\w)?          # a link; an e-mail address
  | @[A-Za-z_]\w* | \#{_L}\w*                                            # a handle; a hashtag
  | [<>]?[:;=][o'-]?[()DdPp3\[\]|](?!{_A}) | \^_\^                       # a smiley
  | (?i:can(?=not\b)|gon(?=na\b)|wan(?=na\b)|got(?=ta\b)|gim(?=me\b)|lem(?=me\b)|'t(?=is\b|was\b))
  | (?i:(?!n't){_L}+?(?=n['’`]t(?!{_A}))|n['’`]t(?!{_A}))                 # do n't
  | {_CLITIC}                                                            # he 's
  | (?i:['’](?:em|til)(?!{_A})|'n'?(?!{_A})|’n’?|['’][2-9]0s|(?:dunkin|somethin)['’]|ol['’](?!{_A}))
  | (?i:(?:{_L}+-)?[dlo]['’]{_L}{{2,}}|e['’]er\b|[dlj]['’](?={_L}))       # hors-d'oeuvre, o'clock, d' a
  | {_L}+[aeiouyAEIOUY](?!{_CLITIC})['’][aeiouA-Z]{_L}*                  # ma'am
  | {_L}(?:\.{_L})+(?!{_A})(?:\.(?:-{_A}+)*)? | (?i:ph\.d\.)             # u.s., t.v, u.s.-based
  | (?:(?i:{_ABBREVIATIONS})|{_CAPITALISED}|{_CAPITALISED.upper()})\.(?!{_A}) | (?i:{_BEFORE_NUMBER})\.(?=\s*\d)
  | {_L}\.(?!{_A}|\s+(?:(?:{_STARTERS}|{_STARTERS.upper()})\b|<{_L}))    # j.
  | (?:\d{{1,4}}[- ])?\d{{1,4}}/\d{{1,4}}(?![/\d]|{_A})                  # 1 1/2
  | \d+(?:[/-]\d+)+(?!{_A})                                              # 10/29/2011
  | [A-Z]+(?:&[A-Z]+)+ | [A-Z]{{1,2}}\$                                  # AT&T, US$
  | \d+:\d+(?=(?i:[ap]m)\b) | {_NUMBER}(?!{_A}|-{_A}|/{_A}|_)           # 5:30 pm, 1,000
  | {_A}+(?:[-/_]{_A}+|[.!?]{_L}+)*(?:\.(?=[,:;]))?                      # t-shirt, and/or, street.a
  | {_NUMBER} | (?:\.[ ]?){{2,}}\. | -+ | [!?]+ | _+ | \*+ | ''|``
  | [^\s\U00010000-\U0010ffff]
""",
    re.VERBOSE,
)


def tokenize(captions):
    """Cut captions into the lower-case tokens that COCO's metrics compare.

    Args:
        captions: list of N texts. A line break counts as a space. As in the reference program, whether a
            one-letter abbreviation that ends a text keeps its period depends on the next text's first word.
    Returns: list of N texts of tokens joined by single spaces, punctuation removed.
    """
    if not captions:
        return []
    text = "\n".join(LINE_BREAKS.sub(" ", caption) for caption in captions).translate(_MARKS)
    lines = [[]]
    for match in _TOKEN.finditer(text):
        if match.lastgroup:
            lines.append([])
            continue
        token = match.group()
        token = _ESCAPES.get(token, token)
        if "’" in token and _CURLY.fullmatch(token):
            token = token.replace("’", "'")
        if token not in PUNCTUATION and token.strip(".- ’"):
            lines[-1].append(token.lower().replace(" ", NO_BREAK_SPACE))
    return [" ".join(tokens) for tokens in lines]
