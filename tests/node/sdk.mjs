// Drives openai-node: `node sdk.mjs BASE_URL SCENARIO [JSON options]` prints what the application saw as a line of JSON.
// With the option `live`, each delta with content is printed before that, as a line of its own, when it is seen.

import { createInterface } from 'node:readline';
import { finished } from 'node:stream/promises';
import OpenAI from 'openai';

const [baseURL, scenario, json = '{}'] = process.argv.slice(2);
const options = { model: 'demo', prompt: 'Hello', after: 3, retries: 0, live: false, headers: {}, ...JSON.parse(json) };

const client = new OpenAI({ baseURL, apiKey: 'sk-test', maxRetries: options.retries, defaultHeaders: options.headers });
const request = {
  model: options.model,
  messages: [{ role: 'user', content: options.prompt }],
  ...options.body,
};
// `usage` is that of the last chunk.
const seen = { text: '', reasoning: '', tool: '', chunks: 0, usage: null, finish: null, models: [], error: null };

function take(chunk) {
  const { delta, finish_reason } = chunk.choices[0] ?? {};
  seen.chunks += 1;
  seen.text += delta?.content ?? '';
  seen.reasoning += delta?.reasoning_content ?? '';
  for (const call of delta?.tool_calls ?? []) seen.tool += (call.function.name ?? '') + (call.function.arguments ?? '');
  seen.finish ??= finish_reason ?? null;
  seen.usage = chunk.usage ?? null;
  if (delta?.content && options.live) console.log(JSON.stringify({ delta: delta.content }));
  return Boolean(delta?.content);
}

async function readAll(extra) {
  const stream = await client.chat.completions.create({ ...request, ...extra, stream: true });
  for await (const chunk of stream) take(chunk);
}

// `leave(stream, deltas)` is asked after every delta with content; true leaves the loop.
async function readUntil(leave) {
  const stream = await client.chat.completions.create({ ...request, stream: true });
  let deltas = 0;
  for await (const chunk of stream) {
    if (take(chunk) && leave(stream, ++deltas)) break;
  }
}

const scenarios = {
  stream: () => readAll(),
  stream_usage: () => readAll({ stream_options: { include_usage: true } }),
  break: () => readUntil((_, deltas) => deltas >= options.after),
  abort: () =>
    readUntil((stream, deltas) => {
      if (deltas === options.after) stream.controller.abort();
      return false;
    }),
  async abort_before_head() {
    const controller = new AbortController();
    createInterface({ input: process.stdin }).on('line', (line) => {
      if (line === 'go') controller.abort();
    });
    await client.chat.completions.create({ ...request, stream: true }, { signal: controller.signal });
  },
  async try_finally() {
    const stream = await client.chat.completions.create({ ...request, stream: true });
    const iterator = stream[Symbol.asyncIterator]();
    try {
      for (let deltas = 0; deltas < options.after; ) {
        const { value, done } = await iterator.next();
        if (done) break;
        if (take(value)) deltas += 1;
      }
    } finally {
      await iterator.return();
    }
  },
  async complete() {
    const completion = await client.chat.completions.create(request);
    seen.text = completion.choices[0].message.content ?? '';
    seen.finish = completion.choices[0].finish_reason;
    seen.usage = completion.usage ?? null;
  },
  async models() {
    for await (const model of client.models.list()) seen.models.push(model.id);
  },
  async model() {
    seen.models.push((await client.models.retrieve(options.model)).id);
  },
};

if (!Object.hasOwn(scenarios, scenario)) {
  throw new Error(`no scenario ${scenario}; there are ${Object.keys(scenarios).join(', ')}`);
}
try {
  await scenarios[scenario]();
} catch (error) {
  const { message, status = null, error: body = null, headers = [] } = error;
  seen.error = { name: error.constructor.name, message, status, body, headers: Object.fromEntries(headers) };
}
console.log(JSON.stringify(seen));

// The process outlives its answer: what the server sees of a client that leaves is not the exit of a process.
const leaving = ['break', 'abort', 'abort_before_head', 'try_finally'].includes(scenario);
if (leaving) await finished(process.stdin.resume());
