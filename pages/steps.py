"""What the browser does by itself, so that what is shown belongs together however late an answer comes.

Every question has a ticket, and its answer is shown only while no other ticket has been drawn since. Another picture,
another model and another question each draw one, in the browser and at once.
"""

import json

from pages.fragments import EMPTY, EXPLAINING

SAME = "{__type__: 'update'}"  # leaves a component as it is
DRAWN = "String(Math.random())"
EMPTY_JS, EXPLAINING_JS = json.dumps(EMPTY), json.dumps(EXPLAINING)

# -> ticket, ticket of the explanation, captions, panel of explanations, caption to explain, words, prefix
FORGET = f"""() => [{DRAWN}, '', {EMPTY_JS}, {{visible: false, __type__: 'update'}},
  {{choices: [], value: null, __type__: 'update'}}, '', '']"""

# answer, ticket -> ticket of the explanation, captions, panel of explanations, caption to explain, words, prefix
SHOW_CAPTIONS = f"""(answer, ticket) => answer?.ticket === ticket
  ? [{DRAWN}, answer.captions, {{visible: true, __type__: 'update'}},
     {{choices: answer.texts.map(text => [text, text]), value: answer.texts[0], __type__: 'update'}},
     {EXPLAINING_JS}, '']
  : Array(6).fill({SAME})"""

# -> ticket of the explanation, words, prefix
ASK_WHY = f"() => [{DRAWN}, {EXPLAINING_JS}, '']"

# answer, ticket of the explanation -> words, prefix
SHOW_WHY = f"""(answer, ticket) => answer?.ticket && answer.ticket === ticket
  ? [answer.words, answer.prefix] : [{SAME}, {SAME}]"""

# words -> words: what was to be explained could not be
WHY_FAILED = f"words => words === {EXPLAINING_JS} ? '' : words"
