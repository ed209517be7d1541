// An exported captioner: a folder that export.py wrote, and the pictures it captions.

import { Refused } from "./errors.js";
import { Preprocess, readPicture } from "./images.js";
import { beam, greedy } from "./searches.js";
import { Stop, Tokenizer } from "./tokenizer.js";

const FORMAT = 2; // of captioner.json
const AGAIN = "export the captioner again";

/**
 * Fetch files, side by side.
 *
 * @param {URL} folder
 * @param {string[]} names
 * @param {(read: number, total: number) => void} progress bytes so far; total: NaN where the server does not say.
 * @returns {Promise<Uint8Array[]>}
 * @throws Refused where one is missing or the server is gone.
 */
async function fetchFiles(folder, names, progress) {
  const answers = await Promise.all(
    names.map(async (name) => {
      const answer = await fetch(new URL(name, folder)).catch(() => {
        throw new Refused(`${name} cannot be fetched: the server does not answer, or this page may not ask it`);
      });
      if (!answer.ok) throw new Refused(`there is no captioner at ${folder.href}: ${name} is missing; ${AGAIN}`);
      return answer;
    }),
  );
  const size = ({ headers }) => (headers.has("Content-Encoding") ? NaN : Number(headers.get("Content-Length") ?? NaN));
  const total = answers.reduce((sum, answer) => sum + size(answer), 0);
  let read = 0;
  return Promise.all(
    answers.map(async (answer, number) => {
      const counted = new TransformStream({
        transform(chunk, stream) {
          progress((read += chunk.byteLength), total);
          stream.enqueue(chunk);
        },
      });
      try {
        return new Uint8Array(await new Response(answer.body.pipeThrough(counted)).arrayBuffer());
      } catch {
        throw new Refused(`${names[number]} broke off while it was fetched; load the page again`);
      }
    }),
  );
}

function parse(bytes, name) {
  try {
    return JSON.parse(new TextDecoder().decode(bytes));
  } catch {
    throw new Refused(`${name} is damaged; ${AGAIN}`);
  }
}

export class Captioner {
  /**
   * Fetch and load a captioner.
   *
   * @param {object} ort onnxruntime-web.
   * @param {URL} folder with a slash at its end.
   * @param {(read: number, total: number) => void} progress see `fetchFiles`.
   * @throws Refused where it is incomplete, damaged, of another version, or of a kind that this page cannot run.
   */
  static async load(ort, folder, progress) {
    const [described] = await fetchFiles(folder, ["captioner.json"], () => {});
    const config = parse(described, "captioner.json");
    if (config?.format !== FORMAT) {
      throw new Refused(`captioner.json has format ${config?.format} and this page reads ${FORMAT}; ${AGAIN}`);
    }
    if (!["greedy", "beam"].includes(config.decoding.method)) {
      throw new Refused(`this captioner is meant for decoding by ${config.decoding.method}, which this page lacks`);
    }
    const preprocess = new Preprocess(config.preprocessing);
    const names = ["tokenizer.json", "weights.bin", ...config.graphs];
    const [words, weights, ...graphs] = await fetchFiles(folder, names, progress);
    const tokenizer = new Tokenizer(parse(words, "tokenizer.json"));
    const begin = [...config.begin_tokens, ...tokenizer.encode(config.decoding.prompt)];
    const stop = new Stop(tokenizer, config.decoding.stop_token, config.end_tokens);
    const sessions = {};
    for (const [number, graph] of graphs.entries()) {
      const name = config.graphs[number];
      const options = { externalData: [{ path: "weights.bin", data: weights }], logSeverityLevel: 3 };
      sessions[name.replace(".onnx", "")] = await ort.InferenceSession.create(graph, options).catch((error) => {
        const said = String(error.message ?? error).slice(0, 200);
        if (said.includes("backend")) throw new Refused(`onnxruntime-web does not start in this browser (${said})`);
        throw new Refused(`${name} cannot be loaded (${said}); ${AGAIN}`);
      });
    }
    return Object.assign(new Captioner(), { ort, config, preprocess, begin, stop, sessions });
  }

  /**
   * Caption a picture.
   *
   * @param {Blob} file
   * @param {string} method greedy or beam.
   * @returns {Promise<{text: string, logprob: number}[]>} best first; logprob: the mean per token.
   * @throws Refused where it is no picture.
   */
  async caption(file, method) {
    const { data, dims } = this.preprocess.apply(await readPicture(file));
    const pixels = new this.ort.Tensor("float32", data, dims);
    const [embedding] = Object.values(await this.sessions.encoder.run({ pixels }));
    const [prefix] = Object.values(await this.sessions.prefill.run({ embedding }));
    const length = this.room();
    let state = await this.step(prefix, this.ids(this.begin, [1, this.begin.length]), [0]);
    const none = (rows) => new this.ort.Tensor("float32", new Float32Array(0), [rows, 0, prefix.dims[2]]);
    const next = async (tokens, sources) => {
      const rows = sources.length;
      state = await this.step(none(rows), this.ids(tokens, [rows, 1]), sources, state.past);
      return this.rows(state.logits);
    };
    const { beam_size: width, length_penalty: penalty, num_captions: count } = this.config.decoding;
    const [first] = this.rows(state.logits);
    const ended = (tokens) => this.stop.ended(tokens);
    const found =
      method === "beam"
        ? await beam(next, first, ended, length, width, penalty, Math.min(count, width))
        : await greedy(next, first, ended, length);
    return found.map(({ tokens, logprob }) => ({
      text: this.stop.textUntil(tokens).split(/\s+/).filter(Boolean).join(" "),
      logprob: logprob / tokens.length,
    }));
  }

  ids(numbers, dims = [numbers.length]) {
    return new this.ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), dims);
  }

  /**
   * Run the language model on what comes next.
   *
   * @param {object} prefix [R, P, E], and tokens [R, T] behind it; either may be empty.
   * @param {object} tokens
   * @param {number[]} sources the row that each goes on from.
   * @param {object[]} [past] keys and values of the layers; none at first.
   * @returns {Promise<{logits: object, past: object[]}>} of the newest token, and all keys and values.
   */
  async step(prefix, tokens, sources, past) {
    const { step } = this.sessions;
    const empty = step.inputMetadata.slice(3).map(({ shape: [, ...sizes] }) => {
      const dims = [sources.length, ...sizes.map((size) => (typeof size === "number" ? size : 0))];
      return new this.ort.Tensor("float32", new Float32Array(0), dims);
    });
    const given = [prefix, tokens, this.ids(sources), ...(past ?? empty)];
    const found = await step.run(Object.fromEntries(step.inputNames.map((name, number) => [name, given[number]])));
    const [logits, ...later] = step.outputNames.map((name) => found[name]);
    return { logits, past: later };
  }

  /** Return the rows [V] of logits [R, V], divided by the temperature. */
  rows({ data, dims: [count, width] }) {
    const { temperature } = this.config.decoding;
    const all = temperature === 1 ? data : data.map((value) => value / temperature);
    return Array.from({ length: count }, (_, row) => all.subarray(row * width, (row + 1) * width));
  }

  /** Return how many tokens a caption can have; throws Refused where the context has no room for one. */
  room() {
    const { context, prefix_length: prefix, decoding } = this.config;
    const room = context ? context + 1 - prefix - this.begin.length : Infinity;
    if (room < 1) throw new Refused(`prefix and prompt fill the ${context} positions of this language model`);
    return Math.min(decoding.entry_length, room);
  }
}
