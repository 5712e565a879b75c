// The page of an export is tools/live.html with this behind it: an ear in the page takes the place
// of the server. The ear speaks the server's protocol (docs/serving.md), and hears as hear.py does.
// tools/web.py writes in front of this SIZES, the numbers of hear.py, RUNTIME and PAUSE.

const SPACE = "\u2581";
const MODEL = "model-streaming.onnx";  // model-streaming.int8.onnx is smaller.

// Opens onnxruntime-web, the streaming graph and its tokens.
async function load() {
  if (location.protocol === "file:")
    throw new Error("Browsers load no model into a page from a file; README.md says how to serve it.");
  for (const name of [...RUNTIME, MODEL, "tokens.txt"])
    if (!(await fetch(name, {method: "HEAD"})).ok)
      throw new Error(`${name} is not beside this page; README.md says what the page needs.`);
  const ort = await import(`./${RUNTIME[0]}`);
  ort.env.wasm.numThreads = 1;  // Threads would need headers that few servers send.
  const session = await ort.InferenceSession.create(MODEL);
  const lines = (await (await fetch("tokens.txt")).text()).split("\n");
  return {ort, session, tokens: lines.map(line => line.split(" ")[0])};
}

class Ear {
  constructor() {
    this.bufferedAmount = 0;  // bytes that are not heard yet
    this.clear();
    this.work = loading.then(loaded => {
      Object.assign(this, loaded);
      this.tell({sample_rate: SIZES.rate, chunk_ms: Math.round(SIZES.chunk_size * SIZES.frame_ms),
        checkpoint: MODEL});
    }).catch(error => this.tell({error: error.message}));
  }

  // Begins a stream. hear() makes the state before the first chunk.
  clear() {
    this.waiting = new Float32Array(0);  // samples
    this.size = SIZES.first;  // samples of the next chunk
    this.least = SIZES.first_least;  // samples of a chunk that is the last
    this.received = this.frames = 0;
    this.token = -1;  // the best one of the frame before
    this.line = [];  // [frame, token] since the last pause
    this.state = null;
  }

  tell(message) {
    if (!this.closed) this.onmessage({data: JSON.stringify(message)});
  }

  close() {
    this.closed = true;
    this.onclose?.();  // The page lets the microphone go.
  }

  // Takes 16-bit samples, or "end"; they are heard one after the other.
  send(message) {
    const bytes = message.byteLength ?? 0;
    this.bufferedAmount += bytes;
    this.work = this.work.then(() => this.closed || this.take(message)).then(() => {
      this.bufferedAmount -= bytes;
    }).catch(error => this.tell({error: error.message}));
  }

  async take(message) {
    const last = message === "end";
    const samples = last ? new Float32Array(SIZES.tail_samples)
      : Float32Array.from(new Int16Array(message), x => x / 32768);
    if (!last) this.received += samples.length;
    const waiting = new Float32Array(this.waiting.length + samples.length);
    waiting.set(this.waiting);
    waiting.set(samples, this.waiting.length);
    this.waiting = waiting;
    while (this.waiting.length >= (last ? this.least : this.size)) {
      this.read(await this.hear(this.waiting.slice(0, this.size)));
      this.waiting = this.waiting.slice(this.size);
      [this.size, this.least] = [SIZES.later, SIZES.later_least];
      this.answer(false);
    }
    if (!last) return;
    this.answer(true);
    this.clear();
  }

  // Runs the graph on a chunk of samples -> its log-probabilities (1,T',V).
  async hear(samples) {
    const {ort, session} = this, cache = SIZES.cache_size;
    const float = (data, dims) => new ort.Tensor("float32", data, dims);
    const zeros = dims => float(new Float32Array(dims.reduce((size, dim) => size * dim, 1)), dims);
    const count = number => new ort.Tensor("int64", [BigInt(number)], [1]);
    this.state ??= {
      kept: [zeros([0]), new ort.Tensor("float64", new Float64Array(3), [3]), zeros([1, 0, SIZES.bins])],
      caches: [zeros(SIZES.attn_shape), zeros(SIZES.conv_shape)], offset: cache,
    };
    const {kept, caches, offset} = this.state;
    // At the beginning the cache holds nothing yet.
    const mask = Uint8Array.from({length: cache + SIZES.chunk_size}, (_, i) => i >= 2 * cache - offset);
    const inputs = [float(samples, [samples.length]), ...kept, count(offset), count(cache), ...caches,
      new ort.Tensor("bool", mask, [1, 1, mask.length])];
    const results = await session.run(
      Object.fromEntries(session.inputNames.map((name, i) => [name, inputs[i]])));
    const [found, ...next] = session.outputNames.map(name => results[name]);
    this.state = {kept: next.slice(0, 3), caches: next.slice(3), offset: offset + SIZES.chunk_size};
    return found;
  }

  // Searches greedily: the best token of each frame, without repetitions and what has no text.
  read({data, dims: [, frames, vocabulary]}) {
    for (let t = 0; t < frames; t++, this.frames++) {
      const row = data.subarray(t * vocabulary, (t + 1) * vocabulary);
      const best = row.reduce((best, x, i) => x > row[best] ? i : best, 0);
      if (![this.token, ...SIZES.silent].includes(best)) this.line.push([this.frames, best]);
      this.token = best;
    }
  }

  // Writes the line as the tokenizer does.
  text() {
    const parts = this.line.map(([, i]) => i === SIZES.unk_id ? SIZES.unknown : this.tokens[i]);
    const text = parts.join("").split(SPACE).filter(part => part).join(" ");
    return (SIZES.lower ? text.toLowerCase() : text).normalize("NFC");
  }

  // Says what was heard. PAUSE milliseconds without a token ends a line, but not the stream; spaces
  // are not counted, because models write them into silence.
  answer(last) {
    const frame = SIZES.frame_ms / 1000;
    const spoken = this.line.filter(([, token]) => this.tokens[token] !== SPACE);
    const quiet = spoken.length ? (this.frames - spoken.at(-1)[0]) * SIZES.frame_ms : 0;
    const final = last || quiet >= PAUSE;
    const text = this.text();
    const seconds = Math.min(this.frames * frame, this.received / SIZES.rate);
    const cues = text ? [[spoken[0][0] * frame, (spoken.at(-1)[0] + 1) * frame, text]] : [];
    this.tell({text, seconds, final, last, words: [], cues});
    if (final) this.line = [];
  }
}

// ---- The page

reach = () => new Ear();
const loading = load();
loading.catch(error => fail(error.message));
document.querySelector("details").hidden = true;  // A greedy search has no hotwords.
$("status").textContent = "Press Talk, and talk. The sound stays in this browser. A pause ends a line.";
