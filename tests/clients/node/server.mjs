// A running server for tests: starts the program, waits until it is ready,
// knows its address, stops it.
import { spawn } from "node:child_process";
import { createInterface } from "node:readline";

export const KEY = "sk-hypergen-123456";
const PROGRAM = process.env.HYPERGEN_PROGRAM ?? "../../../target/release/hypergen";

/** Starts a server with these arguments. */
export async function serve(...args) {
  const env = Object.fromEntries(Object.entries(process.env).filter(([name]) => !name.startsWith("HYPERGEN_")));
  env.HYPERGEN_API_KEY = KEY;
  const child = spawn(PROGRAM, ["serve", "--port", "0", "--log-format", "json", ...args], { env, stdio: ["ignore", "ignore", "pipe"] });
  const exited = new Promise((resolve) => child.on("exit", resolve));
  const lines = createInterface({ input: child.stderr });
  const log = [];
  const url = await new Promise((resolve, reject) => {
    lines.on("line", (line) => {
      log.push(line);
      if (line.includes('"message":"ready"')) resolve(`http://${JSON.parse(line).address}`);
    });
    exited.then(() => reject(new Error(`the server did not start:\n${log.join("\n")}`)));
  });
  const headers = { authorization: `Bearer ${KEY}` };
  return {
    url,
    log,
    health: async () => (await fetch(`${url}/health`)).json(),
    metric: async (name) => {
      const page = await (await fetch(`${url}/metrics`, { headers })).text();
      const line = page.split("\n").find((text) => text.startsWith(name + " "));
      return line ? Number(line.slice(name.length + 1)) : 0;
    },
    stop: async () => {
      child.kill("SIGTERM");
      return exited;
    },
  };
}

/** Returns once the condition holds. */
export async function until(what, condition) {
  const start = Date.now();
  while (!(await condition())) {
    if (Date.now() - start > 300_000) throw new Error(`waited in vain: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}
