// The searches of ClipCap's models/searches.py for one picture.
// `step(tokens, sources)` appends a token to each of the rows named, and resolves to the logits that follow it, a
// Float32Array [V] a row. A caption is {tokens, logprob}: up to and with the token that ended it.

function logSumExp(logits) {
  const top = logits.reduce((most, value) => Math.max(most, value), -Infinity);
  return top + Math.log(logits.reduce((sum, value) => sum + Math.exp(value - top), 0));
}

/** Return the indices of the `number` largest values, largest first, the earlier of equal ones first. */
function largest(values, number) {
  const found = [];
  for (let index = 0; index < values.length; index++) {
    if (found.length === number && !(values[index] > values[found[number - 1]])) continue;
    let place = found.length;
    while (place > 0 && values[index] > values[found[place - 1]]) place--;
    found.splice(place, 0, index);
    found.length = Math.min(found.length, number);
  }
  return found;
}

/** Take the likeliest token every time, until `ended(tokens)` or `length` of them; resolves to one caption. */
export async function greedy(step, logits, ended, length) {
  const caption = { tokens: [], logprob: 0 };
  for (;;) {
    const [token] = largest(logits, 1);
    caption.tokens.push(token);
    caption.logprob += logits[token] - logSumExp(logits);
    if (ended(caption.tokens) || caption.tokens.length >= length) return [caption];
    [logits] = await step([token], [0]);
  }
}

/** Keep the `width` hypotheses with the highest mean log-probability at every step; resolves to `count`, best first. */
export async function beam(step, logits, ended, length, width, penalty, count) {
  const mean = ({ logprob, tokens }) => logprob / tokens.length ** penalty;
  const extended = (hypothesis, logits, source) => {
    const total = logSumExp(logits);
    return largest(logits, width).map((token) => ({
      tokens: [...hypothesis.tokens, token],
      logprob: hypothesis.logprob + logits[token] - total,
      source,
    }));
  };
  const judged = (hypotheses) => hypotheses.map((one) => ({ ...one, stopped: one.stopped || ended(one.tokens) }));
  let beams = judged(extended({ tokens: [], logprob: 0 }, logits, 0));
  for (let taken = 1; taken < length && !beams.every(({ stopped }) => stopped); taken++) {
    const rows = await step(
      beams.map(({ tokens }) => tokens.at(-1)), // what has ended stays as it is, whatever follows it
      beams.map(({ source }) => source),
    );
    const next = beams.flatMap((one, row) => (one.stopped ? [{ ...one, source: row }] : extended(one, rows[row], row)));
    beams = judged(largest(next.map(mean), beams.length).map((index) => next[index]));
  }
  return largest(beams.map(mean), count).map((index) => beams[index]);
}
