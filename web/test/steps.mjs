// What somebody does with the page, step by step: each sees to what it claims, and returns what is worth telling.

import assert from "node:assert/strict";
import { ITS_OWN } from "./page.mjs";

// As it is called in test/server.exs, and in /v1.
const ENGINE = "Demo.LLM";
const SERVED = "demo";
const SENTENCE = "The capital of France is";
// Options of engines, so that several have room.
const SMALL = "max_model_len: 1024\nkv_cache_memory_bytes: 67108864\nenforce_eager: true";
const PAGES = ["engines", "try", "sizing", "quantize", "quantize/new", "models", "compare"];

export const steps = [
  [
    "asks for a key, refuses a wrong one, takes the right one",
    async (page) => {
      await page.go("engines");
      await page.field("Key").fill("wrong");
      await page.button("Continue").click();
      await page.tab.getByText("does not know this key").waitFor();
      await page.field("Key").fill(page.key);
      await page.tab.keyboard.press("Enter");
      await page.heading("Engines").waitFor();
      assert.equal(await page.tab.evaluate(() => localStorage.length + document.cookie.length), 0);
    },
  ],
  [
    "starts an engine, from the dialog, by keyboard alone",
    async (page) => {
      await page.button("Start an engine").focus();
      await page.tab.keyboard.press("Enter");
      await page.dialog().waitFor();
      await page.field("Model").pressSequentially(process.env.DEMO_MODEL);
      await page.tab.keyboard.press("Tab");
      await page.tab.keyboard.type("second");
      for (let field = 0; field < 7; field += 1) await page.tab.keyboard.press("Tab");
      await page.tab.keyboard.type(SMALL);
      for (let button = 0; button < 2; button += 1) await page.tab.keyboard.press("Tab");
      await page.tab.keyboard.press("Enter");
      await page.heading(/^second/).waitFor();
      await page.ready();
    },
  ],
  [
    "says what is wrong with an option, and keeps the dialog open",
    async (page) => {
      await page.go("engines");
      await page.button("Start an engine").click();
      await page.field("Model").fill(process.env.DEMO_MODEL);
      await page.field("Further options").fill("max_queue: -5");
      await page.button("Start", page.dialog()).click();
      const said = await page.dialog().getByRole("alert").textContent();
      assert.match(said, /max_queue/);
      await page.tab.keyboard.press("Escape");
      await page.dialog().waitFor({ state: "detached" });
      assert.equal(await page.tab.evaluate(() => document.activeElement.textContent), "Start an engine");
      return said.slice(0, 90);
    },
  ],
  [
    "an engine that cannot start says why, and is stopped",
    async (page) => {
      await page.button("Start an engine").click();
      await page.field("Model").fill(process.env.DEMO_MODEL);
      await page.field("Name").fill("misspelt");
      await page.field("Further options").fill("max_model_lenn: 5");
      await page.button("Start", page.dialog()).click();
      // What only vLLM knows takes a moment, in which the dialog may have closed.
      const said = page.tab.getByText(/Did you mean `max_model_len`/);
      await said.first().waitFor();
      const text = await said.first().textContent();
      if (await page.dialog().isVisible()) await page.tab.keyboard.press("Escape");
      else {
        await page.button("Stop…").click();
        await page.button("Stop", page.dialog()).click();
        await page.tab.getByText("It is not there any more.").waitFor();
      }
      return text;
    },
  ],
  [
    "chats, with a stream and parameters",
    async (page) => {
      await page.to("Try").click();
      await page.field("Model").selectOption(SERVED);
      await page.field("Temperature").fill("0");
      await page.field("Most tokens").fill("24");
      await page.field("Message").fill("What is the capital of France?");
      await page.tab.keyboard.press("Enter");
      await page.tab.locator(".measure").waitFor();
      const answer = await page.tab.locator(".turn.assistant .text").textContent();
      assert.match(answer, /Paris/);
      await page.view("chat");
      return `“${answer}”, ${(await page.tab.locator(".measure").textContent()).trim()}`;
    },
  ],
  [
    "goes on with a prompt, and keeps it while other pages are shown",
    async (page) => {
      await page.field("As").selectOption("prompt");
      await page.field("Prompt").fill(SENTENCE);
      await page.button("Send").click();
      await page.tab.locator(".measure").waitFor();
      await page.to("Models").click();
      await page.to("Try").click();
      const text = await page.tab.locator(".turn.assistant .text").textContent();
      assert.match(text, /Paris/);
      return `“${SENTENCE}${text}”`;
    },
  ],
  [
    "figures move while requests run",
    async (page) => {
      await page.go("engines");
      const engine = page.tab.locator(".engine", { hasText: ENGINE });
      await engine.getByRole("link").click();
      await page.heading(new RegExp(`^${ENGINE}`)).waitFor();
      const chart = page.tab.getByRole("img", { name: /^Tokens a second .* now [1-9]/ });
      return page.whileAsked(SERVED, () => chart.getAttribute("aria-label"));
    },
  ],
  [
    "a worker that is killed is shown, and comes back",
    async (page) => {
      const pid = Number(await page.process().textContent());
      assert.ok(pid > 1);
      process.kill(pid, "SIGKILL");
      await page.tab.getByRole("heading", { name: "Deaths" }).waitFor();
      await page.anew(pid);
      await page.tab.locator("details summary").first().click();
      const reason = await page.tab.locator("details summary .bad-text").first().textContent();
      return reason;
    },
  ],
  [
    "drains and resumes, scales to two replicas and back",
    async (page) => {
      await page.button("Drain").click();
      await page.button("Resume").click();
      await page.ready();
      for (const replicas of ["2", "1"]) {
        await page.button("Scale…").click();
        await page.field("Replicas", page.dialog()).fill(replicas);
        await page.button("Scale", page.dialog()).click();
        await page.tab.waitForFunction((n) => document.querySelectorAll("tbody tr").length === n && [...document.querySelectorAll("tbody .state")].every((one) => one.textContent === "ready"), Number(replicas));
        if (replicas === "2") {
          await page.whileAsked(SERVED, async () => {
            // Both have something to do.
            await page.tab.waitForFunction(() => [...document.querySelectorAll("tbody tr td:nth-child(3)")].every((one) => Number(one.textContent) > 0));
            await page.view("engine");
          });
        }
      }
    },
  ],
  [
    "reloads with other options while requests run, and no request is refused",
    async (page) => {
      const context = page.tab.locator(".figure", { hasText: "context" }).locator("dd");
      const before = await context.textContent();
      await page.whileAsked(SERVED, async () => {
        await page.button("Reload…").click();
        await page.field("Further options", page.dialog()).fill("max_model_len: 512");
        await page.button("Reload", page.dialog()).click();
        await context.filter({ hasText: "512 tokens" }).waitFor();
        await page.ready();
      });
      return `${before}, then ${await context.textContent()}`;
    },
  ],
  [
    "restarts an engine",
    async (page) => {
      const pid = await page.process().textContent();
      await page.button("Restart").click();
      await page.anew(pid);
    },
  ],
  [
    "reads the log of an engine",
    async (page) => {
      const log = page.tab.getByRole("region", { name: "Log of the engine" });
      await page.tab.waitForFunction(() => document.querySelector(".log[aria-label='Log of the engine']").textContent.split("\n").length > 3);
      return `${(await log.textContent()).split("\n").length} lines`;
    },
  ],
  [
    "says how a model fills the memory, and what would make it fit",
    async (page) => {
      await page.to("Sizing").click();
      await page.field("Model").fill(process.env.DEMO_MODEL);
      await page.field("Device").fill("H100");
      await page.button("Look").click();
      await page.tab.getByText("it fits").waitFor();
      await page.tab.getByRole("img", { name: /^Memory of/ }).first().waitFor();
      // The check takes longer.
      await page.button("Look").waitFor();
      await page.view("sized");
      await page.field("Device").fill("1GiB");
      await page.field("Requests at a time").fill("4096");
      await page.button("Look").click();
      await page.tab.getByText("it does not fit").waitFor();
      return (await page.tab.locator(".remedy").first().textContent()).slice(0, 100);
    },
  ],
  [
    "the wizard makes two GGUF files",
    async (page) => {
      await page.to("Quantize").click();
      await page.link("New job").click();
      await page.field("Model").fill(process.env.DEMO_MODEL);
      await page.field("Name of what comes of it").fill("demo");
      await page.button("Next").click();
      await page.tab.getByRole("checkbox", { name: /^gguf/ }).check();
      await page.button("Next").click();
      await page.tab.getByRole("checkbox", { name: "Q8_0", exact: true }).check();
      await page.tab.getByRole("checkbox", { name: "Q4_K_M", exact: true }).check();
      await page.tab.getByRole("rowheader", { name: "Q4_K_M gguf" }).waitFor();
      await page.view("wizard");
      const sizes = await page.tab.locator("tfoot td").first().textContent();
      await page.button("Next").click();
      await page.view("review");
      await page.button("Start the job").click();
      await page.heading("Quantize").waitFor();
      const job = page.job("demo");
      const state = job.locator("h2 .state", { hasText: /^(done|failed)$/ });
      await state.waitFor(ITS_OWN);
      await page.view("jobs");
      assert.equal(await state.textContent(), "done", await job.textContent());
      return `estimated together: ${sizes}`;
    },
  ],
  [
    "deploys what was made, and asks it",
    async (page) => {
      await page.tab.locator(".outputs li", { hasText: "Q4_K_M" }).getByRole("button", { name: "Deploy…" }).click();
      await page.field("Name", page.dialog()).fill("deployed");
      await page.field("Further options", page.dialog()).fill(SMALL);
      await page.button("Start", page.dialog()).click();
      await page.heading(/^deployed/).waitFor();
      await page.ready();
      await page.tab.locator("main").getByRole("link", { name: "Try", exact: true }).click();
      await page.button("Begin anew").click();
      await page.field("Prompt").fill(SENTENCE);
      await page.button("Send").click();
      await page.tab.locator(".measure").waitFor();
      const text = await page.tab.locator(".turn.assistant .text").textContent();
      assert.match(text, /Paris/);
      return `“${SENTENCE}${text}”`;
    },
  ],
  [
    "stops an engine",
    async (page) => {
      await page.go("engines");
      await page.link("deployed").click();
      await page.button("Stop…").click();
      await page.button("Stop", page.dialog()).click();
      await page.tab.getByText("It is not there any more.").waitFor();
    },
  ],
  [
    "compares models as plots",
    async (page) => {
      await page.to("Compare").click();
      await page.field("Another one").fill(process.env.DEMO_MODEL);
      await page.button("Add").click();
      for (const name of ["demo:Q8_0", "demo:Q4_K_M"]) await page.tab.getByRole("checkbox", { name, exact: true }).check();
      await page.field("Reference").selectOption(process.env.DEMO_MODEL);
      await page.button("Compare").click();
      const result = page.tab.getByRole("region", { name: "Result" });
      await result.or(page.tab.getByRole("alert")).waitFor(ITS_OWN);
      await page.view("compared");
      const plot = await result.getByRole("img", { name: /^What is lost, by size/ }).getAttribute("aria-label");
      for (const name of ["demo:Q8_0", "demo:Q4_K_M"]) assert.match(plot, new RegExp(name));
      return plot;
    },
  ],
  [
    "cancels a job, reads its log, retries it, cancels and deletes it",
    async (page) => {
      const answer = await page.tab.evaluate(async ([model, key]) => {
        const body = JSON.stringify({ model, name: "again", to: [{ format: "gguf", type: "Q6_K" }] });
        const headers = { "Content-Type": "application/json", Authorization: `Bearer ${key}` };
        return (await fetch("api/v1/quantize/jobs", { method: "POST", headers, body })).status;
      }, [process.env.DEMO_MODEL, page.key]);
      assert.equal(answer, 201);
      await page.to("Quantize").click();
      const job = page.job("again");
      await page.button("Cancel", job).click();
      await job.locator("h2 .state", { hasText: "cancelled" }).waitFor();
      await page.button("Retry", job).click();
      await page.button("Cancel", job).click();
      await job.locator("h2 .state", { hasText: "cancelled" }).waitFor();
      await page.button("Log", job).click();
      await job.getByRole("region", { name: "Log of again" }).waitFor();
      await page.button("Delete…", job).click();
      await page.button("Delete", page.dialog()).click();
      await job.waitFor({ state: "detached" });
    },
  ],
  [
    "shares a model on the hub, which needs a token that may write",
    async (page) => {
      await page.to("Models").click();
      for (const [token, said] of [
        ["hf_bad", /token/],
        ["hf_good_write", null],
      ]) {
        await page.button("Share demo:Q4_K_M").click();
        await page.field("Repository").fill("me/demo-Q4_K_M");
        await page.field("Access token").fill(token);
        await page.button("Share", page.dialog()).click();
        if (said) {
          const refused = page.tab.getByRole("alert");
          await refused.waitFor();
          assert.match(await refused.textContent(), said);
          if (await page.dialog().isVisible()) await page.tab.keyboard.press("Escape");
          else await page.button("Close what came of demo:Q4_K_M").click();
        }
      }
      const address = page.tab.getByRole("list", { name: "Uploads" }).getByRole("link");
      await address.waitFor();
      await page.view("shared");
      const url = await address.getAttribute("href");
      const card = await (await fetch(`${url}/resolve/main/README.md`, { headers: { Authorization: "Bearer hf_good_write" } })).text();
      assert.match(card, /Q4_K_M/);
      return new URL(url).pathname;
    },
  ],
  [
    "deletes a model of this machine",
    async (page) => {
      await page.to("Models").click();
      await page.button("Delete demo:Q8_0").click();
      await page.button("Delete", page.dialog()).click();
      await page.tab.getByRole("rowheader", { name: "demo:Q8_0" }).waitFor({ state: "detached" });
    },
  ],
  [
    "axe finds nothing serious on any page, light and dark, wide and as on a phone",
    async (page) => {
      for (const place of PAGES) {
        await page.go(place);
        await page.tab.locator("h1").waitFor();
        await page.view(place.replace("/", "-"));
      }
      await page.go("engines");
      await page.link("second").click();
      await page.tab.locator(".charts").waitFor();
      await page.button("Reload…").click();
      await page.view("reload");
      await page.tab.keyboard.press("Escape");
      return `${page.views} views, those of the other steps among them`;
    },
  ],
  [
    "asks no other host, breaks no security policy, raises no error",
    async (page) => {
      assert.deepEqual(page.faults, []);
      assert.deepEqual([...page.hosts], [new URL(page.url).host]);
      return `${[...page.hosts].length} host`;
    },
  ],
];
