// Reads recorded streams to their ends: `node yields.mjs STREAMS BASE_URL…`. STREAMS is a list of objects in JSON, with
// the `name` and the `api` of each, chat or completions; its name is the model that is asked for.
// Prints an object in JSON: for each client, stream and base URL, what the client yielded, and what it raised.

import { createOpenAI } from '@ai-sdk/openai';
import { streamText } from 'ai';
import OpenAI from 'openai';

const [streams, ...baseURLs] = process.argv.slice(2);
const messages = [{ role: 'user', content: 'Hello' }];
globalThis.AI_SDK_LOG_WARNINGS = false;

// The AI SDK always requests usage. An application that does not want it takes the option out again.
function withoutOptions(url, init) {
  const { stream_options: _, ...body } = JSON.parse(init.body);
  return fetch(url, { ...init, body: JSON.stringify(body) });
}

const readers = {
  openai(baseURL, { name, api }) {
    const client = new OpenAI({ baseURL, apiKey: 'k', maxRetries: 0 });
    return api === 'chat'
      ? client.chat.completions.create({ model: name, stream: true, messages })
      : client.completions.create({ model: name, stream: true, prompt: 'Hello' });
  },
  ai(baseURL, { name, api }) {
    const provider = createOpenAI({ baseURL, apiKey: 'k', fetch: withoutOptions });
    const model = api === 'chat' ? provider.chat(name) : provider.completion(name);
    return streamText({ model, prompt: 'Hello', maxRetries: 0, onError() {} }).fullStream;
  },
};

// What differs from one reading to the next: what was sent, response headers, times.
function kept(key, value) {
  if (value instanceof Error) return `${value.constructor.name}: ${value.message}`;
  return ['request', 'headers', 'timestamp', 'performance'].includes(key) ? undefined : value;
}

async function read(reader, baseURL, stream) {
  const seen = { yielded: [], raised: null };
  try {
    for await (const part of await reader(baseURL, stream)) seen.yielded.push(JSON.stringify(part, kept));
  } catch (error) {
    seen.raised = `${error.constructor.name}: ${error.message}`;
  }
  return seen;
}

const seen = {};
for (const [client, reader] of Object.entries(readers)) {
  seen[client] = {};
  for (const stream of JSON.parse(streams)) {
    seen[client][stream.name] = await Promise.all(baseURLs.map((baseURL) => read(reader, baseURL, stream)));
  }
}
console.log(JSON.stringify(seen));
