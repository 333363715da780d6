// A page in Chromium, which notes what no page of ours may do: ask another host, break the security policy, raise
// an error.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { chromium } from "playwright-core";

const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const CHROMIUM = process.env.CHROMIUM ?? "/usr/bin/chromium";
// Without these Chromium asks hosts of its maker.
const QUIET = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];

const FOLDER = new URL("../../", import.meta.url).pathname;
// For whatever has no limit of its own: long enough for a machine that has much else to do.
const LIMIT_MS = 600_000;
// What ends by itself, well or not, as starts of engines and jobs do, is waited for without one.
export const ITS_OWN = { timeout: 0 };
const SIZES = { phone: { width: 375, height: 740 }, wide: { width: 1280, height: 860 } };

// Has a model asked by some clients again and again, from within the page, until `enough` is called, which
// resolves to the statuses that there were.
function asking([model, key]) {
  const headers = { "Content-Type": "application/json", Authorization: `Bearer ${key}` };
  let on = true;
  const client = async (n) => {
    const statuses = [];
    for (let turn = 0; on; turn += 1) {
      await new Promise((resolve) => setTimeout(resolve, 100 * n));
      const body = { model, prompt: "The capital of France is", max_tokens: 100 * (1 + ((n + turn) % 4)), ignore_eos: true };
      statuses.push((await fetch("v1/completions", { method: "POST", headers, body: JSON.stringify(body) })).status);
    }
    return statuses;
  };
  const all = Promise.all(Array.from({ length: 8 }, (_none, n) => client(n)));
  window.enough = async () => {
    on = false;
    return [...new Set((await all).flat())];
  };
}

export class Page {
  static async open(url, key, shots) {
    const browser = await chromium.launch({ executablePath: CHROMIUM, args: ["--no-sandbox", "--disable-gpu", ...QUIET] });
    const context = await browser.newContext({ viewport: SIZES.wide, colorScheme: "light", reducedMotion: "reduce" });
    return new Page(browser, await context.newPage(), { url, key, shots });
  }

  constructor(browser, tab, { url, key, shots }) {
    Object.assign(this, { browser, tab, url, key, shots, faults: [], hosts: new Set(), views: 0 });
    tab.setDefaultTimeout(LIMIT_MS);
    tab.on("pageerror", (error) => this.faults.push(`error: ${error.message}`));
    tab.on("console", (line) => /Content Security Policy/i.test(line.text()) && this.faults.push(line.text()));
    tab.on("request", (request) => this.hosts.add(new URL(request.url()).host));
  }

  version() {
    return this.browser.version();
  }

  close() {
    return this.browser.close();
  }

  async go(place) {
    await this.tab.goto(`${this.url}#/${place}`);
  }

  // Without the folder that the library is in, which says nothing to anybody else.
  async shot(name, options = {}) {
    await this.tab.evaluate((folder) => {
      const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
      while (texts.nextNode()) texts.currentNode.data = texts.currentNode.data.replaceAll(folder, "");
    }, FOLDER);
    await this.tab.screenshot({ path: `${this.shots}${name}.png`, ...options });
  }

  // To one of the pages.
  to(name) {
    return this.tab.getByRole("navigation").getByRole("link", { name });
  }

  link(name) {
    return this.tab.getByRole("link", { name, exact: true });
  }

  button(name, within = this.tab) {
    return within.getByRole("button", { name, exact: true });
  }

  field(name, within = this.tab) {
    return within.getByLabel(name, { exact: true });
  }

  heading(name) {
    return this.tab.getByRole("heading", { name, level: 1 });
  }

  // The card of a job, which may tell of others.
  job(name) {
    return this.tab.locator(".job").filter({ has: this.tab.locator("h2", { hasText: new RegExp(`^${name} `) }) });
  }

  dialog() {
    return this.tab.getByRole("dialog");
  }

  // The engine that is shown, once it serves.
  async ready() {
    const state = this.tab.locator("h1 .state", { hasText: /^(ready|failed)$/ });
    await state.waitFor(ITS_OWN);
    assert.equal(await state.textContent(), "ready", await this.tab.locator("main").textContent());
  }

  // Its first replica's process.
  process() {
    return this.tab.locator("tbody tr").first().locator("td").last();
  }

  // The same engine with another process than that, ready.
  async anew(pid) {
    await this.process().filter({ hasNotText: new RegExp(`^${pid}$`) }).filter({ hasText: /^\d+$/ }).waitFor();
    await this.ready();
  }

  // What is done while a model is asked, of whose answers each has to be one.
  async whileAsked(model, work) {
    await this.tab.evaluate(asking, [model, this.key]);
    const enough = () => this.tab.evaluate(() => window.enough());
    const found = await work().catch((error) => enough().then(() => Promise.reject(error)));
    assert.deepEqual(await enough(), [200]);
    return found;
  }

  // Faults of accessibility that axe calls serious or critical. Its script comes by the debugger, which the page's
  // security policy does not bind.
  async axe() {
    await this.tab.evaluate(AXE);
    const { violations } = await this.tab.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
    return violations
      .filter(({ impact }) => impact === "serious" || impact === "critical")
      .map(({ id, nodes }) => `${id}: ${nodes.map((node) => node.target.join(" ")).join(", ")}`);
  }

  // What is shown now, as everybody may see it: nothing serious in light and dark, wide and as on a phone.
  async view(name) {
    await this.shot(name);
    const found = [];
    for (const colorScheme of ["light", "dark"]) {
      await this.tab.emulateMedia({ colorScheme });
      for (const [size, viewport] of Object.entries(SIZES)) {
        await this.tab.setViewportSize(viewport);
        await this.shot(`${name}-${colorScheme}-${size}`, { fullPage: true });
        await this.fits();
        found.push(...(await this.axe()).map((fault) => `${name}, ${colorScheme}, ${size}: ${fault}`));
        this.views += 1;
      }
    }
    await this.tab.emulateMedia({ colorScheme: "light" });
    await this.tab.setViewportSize(SIZES.wide);
    assert.deepEqual(found, []);
  }

  // Nothing may stand out of the page to the right.
  async fits() {
    const [content, window] = await this.tab.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
    assert.ok(content <= window, `${await this.tab.url()} is ${content} wide in a window of ${window}`);
  }
}
