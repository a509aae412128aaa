// OpenAI's own client for JavaScript: node with_node.mjs NODE_MODULES BASE_URL

import assert from "node:assert/strict";
import { createRequire } from "node:module";

const [modules, baseURL] = process.argv.slice(2);
const { default: OpenAI } = createRequire(`${modules}/`)("openai");
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is a contract?" }];
const asked = { model: "legal", messages, max_tokens: 8, temperature: 0 };
const schema = {
  type: "object",
  properties: { unit: { type: "string", enum: ["C", "F"] } },
  required: ["unit"],
  additionalProperties: false,
};
const weather = { type: "function", function: { name: "weather", strict: true, parameters: schema } };

const whole = await client.chat.completions.create(asked);
assert.equal(whole.choices[0].finish_reason, "length");
assert.equal(whole.usage.completion_tokens, 8);

let text = "";
let usage = null;
const stream_options = { include_usage: true };
for await (const chunk of await client.chat.completions.create({
  ...asked,
  stream: true,
  stream_options,
})) {
  text += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, whole.choices[0].message.content);
assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
assert.equal(usage.total_tokens, whole.usage.total_tokens);

const called = await client.chat.completions.create({
  ...asked,
  max_tokens: 300,
  tools: [weather],
  tool_choice: { type: "function", function: { name: "weather" } },
});
const [call] = called.choices[0].message.tool_calls;
assert.equal(call.function.name, "weather");
assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)), ["unit"]);

const structured = await client.chat.completions.parse({
  ...asked,
  max_tokens: 200,
  response_format: { type: "json_schema", json_schema: { name: "unit", schema, strict: true } },
});
assert.ok(["C", "F"].includes(structured.choices[0].message.parsed.unit));

const completion = await client.completions.create({ model: "legal", prompt: "One", max_tokens: 4 });
assert.ok(completion.choices[0].text);

const response = await client.responses.create({
  model: "legal",
  input: "What is a tort?",
  max_output_tokens: 4,
});
assert.ok(response.output_text);

const models = [];
for await (const model of client.models.list()) models.push(model.id);
assert.ok(models.includes("legal"));
assert.equal((await client.models.retrieve("legal")).id, "legal");

await assert.rejects(client.chat.completions.create({ ...asked, model: "nobody" }), (error) => {
  assert.ok(error instanceof OpenAI.NotFoundError);
  assert.equal(error.code, "model_not_found");
  assert.equal(error.param, "model");
  return true;
});
await assert.rejects(client.chat.completions.create({ ...asked, temperature: -1 }), (error) => {
  assert.ok(error instanceof OpenAI.BadRequestError);
  assert.equal(error.param, "temperature");
  return true;
});
await assert.rejects(
  client.chat.completions.create(asked, { timeout: 1 }),
  OpenAI.APIConnectionTimeoutError,
);

const leaving = new AbortController();
const running = client.chat.completions.create(
  { ...asked, max_tokens: 900, stream: true },
  { signal: leaving.signal },
);
await assert.rejects(async () => {
  for await (const _ of await running) leaving.abort();
  leaving.signal.throwIfAborted();
});
