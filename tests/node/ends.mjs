// Reads one stream of each API to its end: `node ends.mjs BASE_URL` prints, for each, what the application saw of it.

import Anthropic from '@anthropic-ai/sdk';
import OpenAI from 'openai';

const [baseURL] = process.argv.slice(2);
const openai = new OpenAI({ baseURL: `${baseURL}/v1`, apiKey: 'k', maxRetries: 0 });
const anthropic = new Anthropic({ baseURL, apiKey: 'k', maxRetries: 0 });
const messages = [{ role: 'user', content: 'Hello' }];

const streams = {
  chat: () => openai.chat.completions.create({ model: 'm', stream: true, messages }),
  responses: () => openai.responses.create({ model: 'm', stream: true, input: 'Hello' }),
  messages: () => anthropic.messages.create({ model: 'm', max_tokens: 9, stream: true, messages }),
  messages_helper: () => anthropic.messages.stream({ model: 'm', max_tokens: 9, messages }),
};

async function read(api) {
  const seen = { api, events: 0, error: null };
  try {
    for await (const _ of await streams[api]()) seen.events += 1;
  } catch (error) {
    const cause = error.cause?.message ?? null;
    seen.error = { name: error.constructor.name, message: error.message, code: error.code ?? null, cause };
  }
  return seen;
}

for (const seen of await Promise.all(Object.keys(streams).map(read))) console.log(JSON.stringify(seen));
