// The captioner's thread: the page stays alive while it loads and works. One job at a time, in order; a picture that a
// later one has replaced is not captioned any more.

import { Captioner } from "./captioner.js";
import { Refused } from "./errors.js";

let captioner;
let newest;
let jobs = Promise.resolve();

async function load({ folder }) {
  const ort = await import("./vendor/ort.wasm.bundle.min.mjs").catch(() => {
    throw new Refused("onnxruntime-web is not beside this page: run python docs/browser/serve.py, which fetches it");
  });
  ort.env.wasm.numThreads = 1; // several need headers that a static server does not send
  ort.env.wasm.wasmPaths = { wasm: new URL("./vendor/ort-wasm-simd-threaded.wasm", import.meta.url).href };
  ort.env.logLevel = "error";
  captioner = await Captioner.load(ort, new URL(folder), (read, total) => postMessage({ kind: "progress", read, total }));
  const { decoding, dtype, made_of: made } = captioner.config;
  postMessage({ kind: "loaded", method: decoding.method, beams: decoding.beam_size, dtype, name: made.checkpoint });
}

async function caption({ ticket, file, method }) {
  if (!captioner || ticket !== newest) return;
  const start = performance.now();
  const captions = await captioner.caption(file, method);
  postMessage({ kind: "captioned", ticket, captions, milliseconds: performance.now() - start });
}

addEventListener("message", ({ data }) => {
  newest = data.ticket ?? newest;
  jobs = jobs
    .then(() => (data.kind === "load" ? load(data) : caption(data)))
    .catch((error) => {
      if (!(error instanceof Refused)) console.error(error);
      const text = error instanceof Refused ? error.message : `this browser failed at it: ${error.message ?? error}`;
      postMessage({ kind: "failed", job: data.kind, ticket: data.ticket, text });
    });
});
