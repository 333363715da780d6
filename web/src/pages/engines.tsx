import { useState } from "preact/hooks";
import { latency, number, percent, short } from "../format";
import { useLive } from "../live";
import { Gauge } from "../parts/bars";
import { Sparkline } from "../parts/charts";
import { Figure } from "../parts/figure";
import { State } from "../parts/state";
import { link } from "../route";
import type { Engine } from "../types";
import { StartDialog } from "./start";

// How many samples a card shows.
const LAST = 60;

export function EnginesPage() {
  const { now } = useLive();
  const [starting, setStarting] = useState(false);

  return (
    <>
      <div class="head">
        <h1 tabIndex={-1}>Engines</h1>
        <button type="button" class="primary" onClick={() => setStarting(true)}>
          Start an engine
        </button>
      </div>
      {now === null && <p class="muted">Waiting for the server…</p>}
      {now?.engines.length === 0 && (
        <p class="card empty">No engine runs. Start one with a folder, a GGUF file, a name of the Hugging Face hub, or a model of this machine.</p>
      )}
      <ul class="cards">
        {now?.engines.map((engine) => (
          <li key={engine.id}>
            <EngineCard engine={engine} />
          </li>
        ))}
      </ul>
      {starting && <StartDialog onClose={() => setStarting(false)} />}
    </>
  );
}

export const title = (engine: Engine): string => engine.name ?? short(engine.model);

function EngineCard({ engine }: { engine: Engine }) {
  const { history } = useLive();
  const tokens = (history.get(engine.id) ?? []).slice(-LAST).map((sample) => sample.tokens);

  return (
    <article class="card engine">
      <div class="what">
        <h2>
          <a href={link("engines", engine.id)}>{title(engine)}</a> <State state={engine.state} />
        </h2>
        <p class="muted path">{engine.model}</p>
        <p class="muted">
          {engine.quantization ?? "plain"} · {engine.replicas.length === 1 ? "1 replica" : `${engine.replicas.length} replicas`}
          {engine.deaths.length > 0 && <span class="bad-text"> · {engine.deaths.length === 1 ? "1 death" : `${engine.deaths.length} deaths`}</span>}
        </p>
      </div>
      {engine.state === "loading" ? (
        <Loading engine={engine} />
      ) : engine.error ? (
        <p class="note bad">{engine.error.message}</p>
      ) : (
        <>
          <Sparkline values={tokens} label={`Tokens a second in the last minute, now ${number(engine.tokens_per_second)}`} />
          <dl class="figures">
            <Figure name="tokens/s" value={number(engine.tokens_per_second)} />
            <Figure name="running" value={number(engine.running)} />
            <Figure name="waiting" value={number(engine.waiting)} />
            <Figure name="TTFT" value={latency(engine.ttft_seconds)} />
            <Figure name="ITL" value={latency(engine.itl_seconds)} />
            <Figure name="KV cache" value={percent(engine.kv_cache_usage)} />
          </dl>
        </>
      )}
    </article>
  );
}

export function Loading({ engine: { progress } }: { engine: Engine }) {
  const share = progress?.percent ?? null;
  const text = progress?.text ?? "starting";
  return (
    <div class="loading">
      <Gauge role="progressbar" label="Loading" share={share === null ? null : share / 100} text={text} />
      <p class="muted">{text}</p>
    </div>
  );
}
