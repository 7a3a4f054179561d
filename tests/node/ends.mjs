// Reads one stream of each API to its end, with its SDK and with the Vercel AI SDK: `node ends.mjs BASE_URL...` prints,
// for each, what the application saw of it.

import { createAnthropic } from '@ai-sdk/anthropic';
import { createGoogleGenerativeAI } from '@ai-sdk/google';
import { createOpenAI } from '@ai-sdk/openai';
import Anthropic from '@anthropic-ai/sdk';
import { GoogleGenAI } from '@google/genai';
import { streamText } from 'ai';
import OpenAI from 'openai';

const messages = [{ role: 'user', content: 'Hello' }];

globalThis.AI_SDK_LOG_WARNINGS = false;
// What the AI SDK makes of a stream: its errors are parts of what it streams.
async function* aiSdk(model) {
  for await (const part of streamText({ model, prompt: 'Hello', maxRetries: 0, onError() {} }).fullStream) {
    if (part.type === 'error') throw part.error;
    if (part.type === 'text-delta') yield part;
  }
}

function streamsOf(baseURL) {
  const under = { baseURL: `${baseURL}/v1`, apiKey: 'k' };
  const openai = new OpenAI({ ...under, maxRetries: 0 });
  const anthropic = new Anthropic({ baseURL, apiKey: 'k', maxRetries: 0 });
  const google = new GoogleGenAI({ apiKey: 'k', httpOptions: { baseUrl: baseURL, apiVersion: 'v1' } });
  return {
    chat: () => openai.chat.completions.create({ model: 'm', stream: true, messages }),
    responses: () => openai.responses.create({ model: 'm', stream: true, input: 'Hello' }),
    messages: () => anthropic.messages.create({ model: 'm', max_tokens: 9, stream: true, messages }),
    messages_helper: () => anthropic.messages.stream({ model: 'm', max_tokens: 9, messages }),
    gemini: () => google.models.generateContentStream({ model: 'm', contents: 'Hello' }),
    ai_chat: () => aiSdk(createOpenAI(under).chat('m')),
    ai_responses: () => aiSdk(createOpenAI(under).responses('m')),
    ai_messages: () => aiSdk(createAnthropic(under)('m')),
    ai_gemini: () => aiSdk(createGoogleGenerativeAI(under)('m')),
  };
}

const texts = {
  chat: (chunk) => chunk.choices[0].delta.content,
  responses: (event) => event.type === 'response.output_text.delta' && event.delta,
  messages: (event) => event.type === 'content_block_delta' && event.delta.text,
  gemini: (response) => response.text,
  ai: (part) => part.text,
};

// A line of JSON, as `Ended` in ends.py has it.
async function read([api, begin]) {
  const text = texts[api] ?? texts[api.split('_')[0]];
  const seen = { api, text: '', error: '' };
  try {
    for await (const event of await begin()) seen.text += text(event) || '';
  } catch (error) {
    seen.error = `${error.constructor.name}: ${error.message} (${error.cause?.message})`;
    seen.code = error.code ?? null;
    seen.status = error.status ?? error.statusCode ?? null;
  }
  return JSON.stringify(seen);
}

const all = process.argv.slice(2).flatMap((baseURL) => Object.entries(streamsOf(baseURL)));
for (const seen of await Promise.all(all.map(read))) console.log(seen);
