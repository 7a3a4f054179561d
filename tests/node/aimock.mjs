// Serves @copilotkit/aimock: `node aimock.mjs` prints {"port": N} when it is ready and ends when stdin closes.
// Each fixture answers the request whose user message is its name.

import { finished } from 'node:stream/promises';
import { LLMock } from '@copilotkit/aimock';

const TEXT = 'The quick brown fox jumps over the lazy dog. Größe, 東京!';
const usage = { prompt_tokens: 11, completion_tokens: 17, total_tokens: 28 };

const mock = new LLMock({ host: '127.0.0.1', port: 0, logLevel: 'silent' });

function fixture(name, response, options) {
  mock.onMessage(new RegExp(`^${name}$`), response, options);
}

fixture('text', { content: TEXT, usage }, { chunkSize: 5 });
fixture('paced', { content: TEXT, usage }, { chunkSize: 5, streamingProfile: { ttft: 200, tps: 50 } });
fixture('reasoning', { content: TEXT, reasoning: 'Let me think.', usage }, { chunkSize: 5 });
fixture('tool', { toolCalls: [{ id: 'call_1', name: 'weather', arguments: '{"city":"Köln"}' }] }, { chunkSize: 5 });
fixture('slow', { content: TEXT, usage }, { chunkSize: 1, latency: 50 });
fixture('truncated', { content: TEXT, usage }, { chunkSize: 5, latency: 10, truncateAfterChunks: 4 });
fixture('disconnected', { content: TEXT, usage }, { chunkSize: 1, latency: 20, disconnectAfterMs: 150 });
fixture('unanswered', { content: TEXT, usage }, { latency: 1000, disconnectAfterMs: 100 });
// aimock cuts between UTF-16 units, so each half of a character arrives as a lone surrogate in JSON.
fixture('surrogates', { content: '🦊🐇' }, { chunkSize: 1 });
fixture('limited', {
  status: 429,
  retryAfter: 7,
  error: { message: 'Slow down.', type: 'rate_limit_error', code: 'rate_limit_exceeded' },
});
fixture('broken', { status: 500, error: { message: 'It broke.', type: 'server_error' } });

await mock.start();
console.log(JSON.stringify({ port: mock.port }));
await finished(process.stdin.resume());
process.exit();
