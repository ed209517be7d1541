// Tokens <-> text, by a tokenizer.json of byte-level BPE: GPT-2's, OPT's and their kind.

import { Refused } from "./errors.js";

const WORDS = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu; // GPT-2's

/** Return the characters that stand for the 256 bytes: themselves where they can be seen, others from U+0100 on. */
function byteCharacters() {
  const seen = (byte) => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(seen(byte) ? byte : next++));
}

export class Tokenizer {
  /**
   * @param {object} json tokenizer.json.
   * @throws Refused where it is of another kind.
   */
  constructor(json) {
    const { model, decoder, normalizer, pre_tokenizer: words, added_tokens: added = [] } = json;
    if (model?.type !== "BPE" || decoder?.type !== "ByteLevel") {
      throw new Refused("this page knows byte-level BPE tokenizers only, as of GPT-2 and OPT; this captioner has another");
    }
    this.vocabulary = new Map(Object.entries(model.vocab));
    this.tokens = new Map([...this.vocabulary].map(([token, id]) => [id, token]));
    this.merges = new Map(model.merges.map((pair, rank) => [Array.isArray(pair) ? pair.join(" ") : pair, rank]));
    this.whole = model.ignore_merges; // words that are tokens are taken whole
    this.added = new Map(added.map(({ content, id }) => [content, id]));
    this.special = new Set(added.filter(({ special }) => special).map(({ id }) => id));
    for (const { content, id } of added) this.tokens.set(id, content);
    this.splits = words?.type === "ByteLevel" && words.use_regex !== false && !normalizer;
    this.spaced = words?.add_prefix_space;
    this.characters = byteCharacters();
    this.bytes = new Map(this.characters.map((character, byte) => [character, byte]));
  }

  /** Return the text of token ids, without special tokens. */
  decode(ids) {
    const bytes = ids.flatMap((id) => {
      if (this.special.has(id) || !this.tokens.has(id)) return [];
      const found = [...this.tokens.get(id)].map((character) => this.bytes.get(character));
      return found.includes(undefined) ? [...new TextEncoder().encode(this.tokens.get(id))] : found;
    });
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(bytes));
  }

  /**
   * Return the token ids of a text, without those that a tokenizer adds around it.
   *
   * @throws Refused where the tokenizer divides words in another way than GPT-2's.
   */
  encode(text) {
    if (text && !this.splits) {
      throw new Refused("this captioner has a prompt, and a tokenizer whose words this page cannot divide");
    }
    const escaped = [...this.added.keys()].map((token) => token.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    const parts = escaped.length ? text.split(new RegExp(`(${escaped.join("|")})`)) : [text];
    return parts.filter(Boolean).flatMap((part) => this.added.get(part) ?? this.encodePlain(part));
  }

  encodePlain(text) {
    const spaced = this.spaced && !text.startsWith(" ") ? ` ${text}` : text;
    return spaced.match(WORDS).flatMap((word) => {
      const characters = Array.from(new TextEncoder().encode(word), (byte) => this.characters[byte]);
      const known = this.whole && this.vocabulary.get(characters.join(""));
      return known || known === 0 ? [known] : this.merge(characters).map((piece) => this.vocabulary.get(piece));
    });
  }

  /** Join neighbours for as long as there is a merge, the earliest learned first. */
  merge(pieces) {
    for (;;) {
      const ranks = pieces.slice(1).map((piece, i) => this.merges.get(`${pieces[i]} ${piece}`) ?? Infinity);
      const best = Math.min(...ranks);
      if (best === Infinity) return pieces;
      const joined = [];
      for (let i = 0; i < pieces.length; i++) {
        joined.push(ranks[i] === best ? pieces[i] + pieces[++i] : pieces[i]);
      }
      pieces = joined;
    }
  }
}

/** Tells whether tokens have ended: by an end token, or by the stop text wherever the decoded text has it. */
export class Stop {
  /**
   * @param {Tokenizer} tokenizer
   * @param {string} text that ends a caption, and stays; a special token's ends it and is not shown; "": none.
   * @param {number[]} ends token ids that end a caption.
   */
  constructor(tokenizer, text, ends) {
    const special = tokenizer.special.has(tokenizer.added.get(text));
    this.tokenizer = tokenizer;
    this.text = special ? "" : text;
    this.ends = new Set(special ? [...ends, tokenizer.added.get(text)] : ends);
  }

  ended(tokens) {
    return this.ends.has(tokens.at(-1)) || (this.text !== "" && this.tokenizer.decode(tokens).includes(this.text));
  }

  /** Return the text of a caption, up to and with the stop text. */
  textUntil(tokens) {
    const text = this.tokenizer.decode(tokens);
    const place = this.text ? text.indexOf(this.text) : -1;
    return place < 0 ? text : text.slice(0, place + this.text.length);
  }
}
