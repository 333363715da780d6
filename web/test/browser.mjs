// Drives the page in a headless Chromium against a real server, as somebody would who has never seen it, and writes
// what it found. `test/run` starts the server.
//
//     node test/browser.mjs URL [KEY]

import { mkdirSync, writeFileSync } from "node:fs";
import { Page } from "./page.mjs";
import { steps } from "./steps.mjs";

const [url, key] = process.argv.slice(2);
const shots = new URL("../../_build/dashboard/", import.meta.url).pathname;
mkdirSync(shots, { recursive: true });

const page = await Page.open(url, key, shots);
const rows = [];
let failed = 0;
for (const [name, step] of steps) {
  const start = Date.now();
  let found;
  try {
    found = (await step(page)) ?? "";
  } catch (error) {
    failed += 1;
    found = `FAILED: ${String(error.message ?? error).split("\n")[0]}`;
    await page.shot(`failed-${rows.length}`);
  }
  const seconds = ((Date.now() - start) / 1000).toFixed(1);
  rows.push(`| ${name} | ${found} | ${seconds} s |`);
  console.log(`${found.startsWith("FAILED") ? "not ok" : "ok"} - ${name} (${seconds} s) ${found}`);
}
const version = page.version();
await page.close();

writeFileSync(
  `${shots}result.md`,
  [`Chromium ${version}`, "", "| step | what was found | took |", "| --- | --- | --- |", ...rows, ""].join("\n"),
);
console.log(failed === 0 ? `all ${rows.length} steps passed` : `${failed} of ${rows.length} steps failed`);
process.exit(failed === 0 ? 0 : 1);
