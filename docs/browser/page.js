// The page: what a visitor gives, what the worker answers. Every picture, and every other search, has a ticket; an
// answer to an older ticket is not shown.

const ASKED = `${new URLSearchParams(location.search).get("captioner") ?? "captioner"}/`; // ?captioner=FOLDER
const FOLDER = URL.canParse(ASKED, location.href) ? new URL(ASKED, location.href) : new URL("captioner/", location.href);
const MEGABYTE = 1e6;

const at = (id) => document.getElementById(id);
const megabytes = (bytes) => (bytes / MEGABYTE).toFixed(1);

let worker;
let loaded = false;
let ticket = 0;
let given; // the picture to caption

/** Show one of: a status, an error; null hides it. */
function say(status, error = null) {
  for (const [id, text] of [["status", status], ["error", error]]) {
    at(id).textContent = text ?? "";
    at(id).hidden = !text;
  }
}

function method() {
  return document.querySelector("input[name=method]:checked").value;
}

/** Caption the picture there is, for which the worker waits until it has a captioner. */
function ask() {
  ticket += 1;
  at("captions").replaceChildren();
  if (!given) return;
  say(loaded ? "Captioning …" : "The caption comes once the captioner is loaded.");
  if (loaded) worker.postMessage({ kind: "caption", ticket, file: given, method: method() });
}

/** Take a picture from the visitor. */
function take(file) {
  if (!file) return;
  given = file;
  URL.revokeObjectURL(at("picture").src);
  at("picture").src = URL.createObjectURL(file);
  at("picture").alt = `the picture to caption${file.name ? `, ${file.name}` : ""}`;
  at("picture").hidden = false;
  at("hint").textContent = "Drop or paste another, or";
  ask();
}

function listen() {
  at("picture").addEventListener("error", () => (at("picture").hidden = true)); // the worker says why
  at("file").addEventListener("change", ({ target }) => {
    take(target.files[0]);
    target.value = ""; // the same file may be chosen again
  });
  at("methods").addEventListener("change", ask);
  document.addEventListener("paste", ({ clipboardData }) => {
    const [file] = clipboardData.files;
    if (file) take(file);
    else say(null, "what was pasted is no picture");
  });
  const over = (inside) => at("drop").classList.toggle("over", inside);
  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault(); // or the browser would leave for the picture
      over(kind === "dragover");
      if (kind !== "drop") return;
      const [file] = event.dataTransfer.files;
      if (file) take(file);
      else say(null, "what was dropped is no file; save the picture first");
    });
  }
}

/** Offer the pictures that lie beside the captioner, if there are any. */
async function offerSamples() {
  const answer = await fetch(new URL("samples.json", FOLDER)).catch(() => null);
  if (!answer?.ok) return;
  for (const name of await answer.json()) {
    const source = new URL(`samples/${name}`, FOLDER).href;
    const picture = Object.assign(new Image(), { src: source, alt: `sample ${name}`, loading: "lazy" });
    const button = Object.assign(document.createElement("button"), { type: "button" });
    button.append(picture);
    button.addEventListener("click", async () => {
      const found = await fetch(source).catch(() => null);
      if (found?.ok) take(new File([await found.blob()], name));
      else say(null, `${name} cannot be fetched: the server does not answer`);
    });
    const item = document.createElement("li");
    item.append(button);
    at("samples").querySelector("ul").append(item);
  }
  at("samples").hidden = false;
}

const answers = {
  progress({ read, total }) {
    const known = !Number.isNaN(total); // a bar without a value moves to and fro
    if (known) at("progress").value = read / total;
    const done = known ? `${megabytes(read)} of ${megabytes(total)}` : megabytes(read);
    at("captioner").textContent = read === total ? `${done} MB are here; starting …` : `Loading the captioner: ${done} MB`;
  },

  loaded({ method: own, beams, dtype, name }) {
    loaded = true;
    at("progress").hidden = true;
    at("methods").disabled = false;
    at("captioner").textContent = `Captioner: ${name}, ${dtype}`;
    at("beams").textContent = `, ${beams} beams`;
    document.querySelector(`input[name=method][value=${own}]`).checked = true;
    if (given) ask();
    else say("Ready: give it a picture.");
  },

  captioned({ ticket: asked, captions, milliseconds }) {
    if (asked !== ticket) return;
    at("captions").replaceChildren(
      ...captions.map(({ text, logprob }) => {
        const item = document.createElement("li");
        const small = document.createElement("small");
        const number = logprob.toFixed(3).replace("-", "−");
        small.textContent = `log-probability per token ${number} (the nearer to 0, the likelier)`;
        item.append(text, small);
        return item;
      }),
    );
    say(`${Math.round(milliseconds)} ms from the file to the caption`);
    document.querySelector(".found").scrollIntoView({ block: "nearest" }); // it may be below a phone's screen, or above
  },

  failed({ job, ticket: asked, text }) {
    if (job === "load") {
      at("progress").hidden = true;
      at("captioner").textContent = "There is no captioner on this page now.";
      say(null, text);
    } else if (asked === ticket) {
      say(null, text);
    }
  },
};

/** Start the worker through a blob, for such a one has this page's Content-Security-Policy; others have none. */
function startWorker() {
  const code = `import ${JSON.stringify(new URL("worker.js", import.meta.url).href)};`;
  const address = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
  worker = new Worker(address, { type: "module" });
  worker.addEventListener("message", ({ data }) => answers[data.kind](data));
  worker.addEventListener("error", ({ message }) => {
    answers.failed({ job: "load", text: `the captioner's program does not start (${message || "a file is missing"})` });
  });
  worker.postMessage({ kind: "load", folder: FOLDER.href });
}

say("The captioner is being loaded; give a picture at any time.");
at("progress").hidden = false;
listen();
startWorker();
offerSamples();
