"""What the browser does by itself, so that image, captions and explanations match however late an answer comes.

Every request has a ticket, and its answer is shown only while no newer ticket has been drawn. Choosing another picture
or model, or asking again, draws one at once, in the browser.
"""

import json

from pages.fragments import EMPTY, EXPLAINING

SAME = "{__type__: 'update'}"  # leaves a component as it is
DRAWN = "String(Math.random())"
EMPTY_JS, EXPLAINING_JS = json.dumps(EMPTY), json.dumps(EXPLAINING)

# -> ticket, ticket of the explanation, captions, panel of explanations, caption to explain, one's own, words, prefix
FORGET = f"""() => [{DRAWN}, '', {EMPTY_JS}, {{visible: false, __type__: 'update'}},
  {{choices: [], value: null, __type__: 'update'}}, '', '', '']"""

# answer, ticket -> ticket of the explanation, captions, panel of explanations, caption to explain, one's own, words,
# prefix
SHOW_CAPTIONS = f"""(answer, ticket) => answer?.ticket === ticket
  ? [{DRAWN}, answer.captions, {{visible: true, __type__: 'update'}},
     {{choices: answer.texts.map(text => [text, text]), value: answer.texts[0], __type__: 'update'}},
     '', {EXPLAINING_JS}, '']
  : Array(7).fill({SAME})"""

# -> ticket of the explanation, words, prefix, and the other way to choose a caption, which is cleared
ASK_WHY = f"() => [{DRAWN}, {EXPLAINING_JS}, '', null]"

# answer, ticket of the explanation -> words, prefix
SHOW_WHY = f"""(answer, ticket) => answer?.ticket && answer.ticket === ticket
  ? [answer.words, answer.prefix] : [{SAME}, {SAME}]"""

# words -> words, where the explanation failed
WHY_FAILED = f"words => words === {EXPLAINING_JS} ? '' : words"

# scrolls to the captions where they are out of sight, such as below a phone's screen
LOOK = """() => {
  const panel = document.querySelector('#cc-captions'), top = panel.getBoundingClientRect().top
  if (top < 0 || top > innerHeight / 2) panel.scrollIntoView()
}"""


def name_things(samples):
    """Return the JavaScript that names the sample pictures and makes screen readers announce captions.

    Args:
        samples: descriptions of the sample pictures, in their order.
    """
    return f"""() => {{
  const names = {json.dumps(samples)}
  document.querySelectorAll('#cc-samples button').forEach((button, i) => button.setAttribute('aria-label', names[i]))
  document.querySelector('#cc-captions').setAttribute('aria-live', 'polite')
}}"""
