// OpenAI's Node package against the server: answers, its error classes, many
// at once, and a client that leaves.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import OpenAI from "openai";
import { KEY, serve, until } from "../server.mjs";

let server;
let client;

before(async () => {
  server = await serve("--max-queue-size", "40");
  client = new OpenAI({ apiKey: KEY, baseURL: `${server.url}/v1`, maxRetries: 0, timeout: 300_000 });
});

after(async () => {
  assert.equal(await server.stop(), 0);
});

const PNG = Buffer.from("89504e470d0a1a0a", "hex");
const FAST = { size: "auto", num_inference_steps: 2 };

/** Width and height of a PNG, from its header. */
function dimensions(file) {
  assert.deepEqual(file.subarray(0, 8), PNG);
  return [file.readUInt32BE(16), file.readUInt32BE(20)];
}

test("the basic example", async () => {
  const answer = await client.images.generate({ prompt: "A cat holding a sign that says Hello World", size: "1024x1024" });
  assert.ok(Math.abs(answer.created - Date.now() / 1000) < 3600);
  const [picture] = answer.data;
  assert.equal(picture.revised_prompt, "A cat holding a sign that says Hello World");
  const file = Buffer.from(picture.b64_json, "base64");
  assert.deepEqual(dimensions(file), [1024, 1024]);
  const fetched = await fetch(picture.url);
  assert.equal(fetched.headers.get("content-type"), "image/png");
  assert.deepEqual(Buffer.from(await fetched.arrayBuffer()), file);
});

test("forms of answers", async () => {
  const link = await client.images.generate({ prompt: "x", response_format: "url", ...FAST });
  assert.ok(link.data[0].url && link.data[0].b64_json === undefined);
  const data = await client.images.generate({ prompt: "x", response_format: "b64_json", ...FAST });
  assert.ok(data.data[0].b64_json && data.data[0].url === undefined);
  const gpt = await client.images.generate({ model: "gpt-image-1", prompt: "x", quality: "low", background: "auto", ...FAST });
  assert.ok(gpt.data[0].b64_json && gpt.data[0].url === undefined);
});

test("seeds reproduce pictures", async () => {
  const ask = (n, seed) => client.images.generate({ prompt: "red apple", n, seed, response_format: "b64_json", ...FAST });
  const many = await ask(3, 10);
  assert.deepEqual(many.data.map((picture) => picture.seed), [10, 11, 12]);
  const one = await ask(1, 12);
  assert.equal(one.data[0].b64_json, many.data[2].b64_json);
  const random = await client.images.generate({ prompt: "x", ...FAST });
  assert.ok(Number.isSafeInteger(random.data[0].seed));
});

test("models", async () => {
  const { model } = await server.health();
  const list = await client.models.list();
  assert.deepEqual(list.data.map((one) => one.id), [model]);
  assert.equal((await client.models.retrieve(model)).id, model);
  await assert.rejects(client.models.retrieve("dall-e-3"), OpenAI.NotFoundError);
});

test("errors are the package's own", async () => {
  await assert.rejects(client.images.generate({ prompt: "x", n: 11 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "n");
    assert.equal(error.type, "invalid_request_error");
    assert.match(error.message, /between 1 and 10/);
    assert.match(error.requestID, /^req-/);
    return true;
  });
  const wrong = new OpenAI({ apiKey: "sk-wrong", baseURL: `${server.url}/v1` });
  await assert.rejects(wrong.images.generate({ prompt: "x" }), OpenAI.AuthenticationError);
  const lora = client.images.generate({ prompt: "x", lora_path: "/no/such.safetensors" });
  await assert.rejects(lora, OpenAI.InternalServerError);
});

test("many at once get their own", async () => {
  const answers = await Promise.all(
    Array.from({ length: 24 }, (_, i) => client.images.generate({ prompt: `number ${i}`, seed: i, ...FAST })),
  );
  answers.forEach((answer, i) => {
    assert.equal(answer.data[0].revised_prompt, `number ${i}`);
    assert.equal(answer.data[0].seed, i);
  });
});

test("a client that leaves stops its generation", async () => {
  const controller = new AbortController();
  const long = { prompt: "x", size: "auto", n: 10, num_inference_steps: 150 };
  const leaving = client.images.generate(long, { signal: controller.signal });
  leaving.catch(() => {});
  await until("it runs", async () => (await server.health()).in_progress === 1);
  controller.abort();
  await assert.rejects(leaving, OpenAI.APIUserAbortError);
  await until("it has stopped", async () => (await server.health()).in_progress === 0);
  assert.equal(await server.metric('hypergen_clients_left_total{while="running"}'), 1);
  await client.images.generate({ prompt: "x", ...FAST });
});

test("a full queue is a rate limit", async () => {
  const small = await serve("--max-queue-size", "1");
  const other = new OpenAI({ apiKey: KEY, baseURL: `${small.url}/v1`, maxRetries: 0 });
  const controller = new AbortController();
  const long = { prompt: "x", size: "auto", n: 10, num_inference_steps: 150 };
  const requests = [];
  for (const [waiting, running] of [[0, 1], [1, 1]]) {
    requests.push(other.images.generate(long, { signal: controller.signal }));
    await until("it is in", async () => {
      const { queue_size, in_progress } = await small.health();
      return queue_size === waiting && in_progress === running;
    });
  }
  await assert.rejects(other.images.generate({ prompt: "x" }), (error) => {
    assert.ok(error instanceof OpenAI.RateLimitError);
    assert.ok(Number(error.headers.get("retry-after")) >= 1);
    return true;
  });
  controller.abort();
  for (const request of requests) await assert.rejects(request, OpenAI.APIUserAbortError);
  assert.equal(await small.stop(), 0);
});
