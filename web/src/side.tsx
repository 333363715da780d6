import { useState } from "preact/hooks";
import { key } from "./api";
import { file, memory, UNKNOWN } from "./format";
import { useLive } from "./live";
import { Gauge } from "./parts/bars";
import { link } from "./route";
import { nextTheme, theme } from "./theme";
import type { Machine } from "./types";

export const PAGES = [
  ["engines", "Engines"],
  ["try", "Try"],
  ["sizing", "Sizing"],
  ["quantize", "Quantize"],
  ["models", "Models"],
  ["compare", "Compare"],
] as const;

const CONNECTION = { connecting: "connecting", live: "live", lost: "not connected" };
const ENDED = ["done", "failed", "cancelled", "interrupted"];

export function Side({ route: [current = "engines"] }: { route: string[] }) {
  const { state, now } = useLive();
  const [look, setLook] = useState(theme);
  const counts: Record<string, number | undefined> = {
    engines: now?.engines.length,
    quantize: now?.jobs.filter((job) => !ENDED.includes(job.state)).length,
  };

  return (
    <header class="side">
      <div class="brand">
        <img src="favicon.svg" alt="" width="22" height="22" />
        <span>VLLM</span>
        <span class={`connection ${state}`}>{CONNECTION[state]}</span>
      </div>
      <nav aria-label="Pages">
        {PAGES.map(([page, name]) => (
          <a key={page} href={link(page)} aria-current={page === current ? "page" : undefined}>
            {name}
            {!!counts[page] && <span class="count">{counts[page]}</span>}
          </a>
        ))}
      </nav>
      <div class="below">
        {now?.machine && <MachineSummary machine={now.machine} />}
        <div class="actions">
          <button type="button" class="plain" onClick={() => setLook(nextTheme())}>
            Theme: {look}
          </button>
          {key.get() && (
            <button type="button" class="plain" onClick={() => (key.forget(), location.reload())}>
              Forget key
            </button>
          )}
        </div>
      </div>
    </header>
  );
}

function MachineSummary({ machine }: { machine: Machine }) {
  const { memory_bytes: all, memory_available_bytes: free } = machine;
  const used = all === null || free === null ? null : all - free;
  return (
    <section class="machine" aria-label="This machine">
      <Level name="Memory" used={used} all={all} />
      {machine.devices.map((device) => (
        <Level key={device.name} name={device.name} used={device.memory_used_bytes} all={device.memory_bytes} />
      ))}
      <p>
        <span class="muted">Disk free</span> <b>{file(machine.disk_free_bytes)}</b>
      </p>
    </section>
  );
}

function Level({ name, used, all }: { name: string; used: number | null; all: number | null }) {
  const text = `${memory(used)} of ${memory(all)}`;
  return (
    <div class="level">
      <p>
        <span class="muted">{name}</span> <b>{used === null && all === null ? UNKNOWN : text}</b>
      </p>
      <Gauge label={`${name} in use`} share={used === null || !all ? null : used / all} text={text} />
    </div>
  );
}
