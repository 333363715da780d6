// What the server tells once a second, and how it has been since the page was opened.

import { createContext } from "preact";
import { useContext, useEffect, useState } from "preact/hooks";
import { ApiError, events, open } from "./api";
import type { Engine, Snapshot } from "./types";

// Ten minutes.
const KEPT = 600;

export interface Sample {
  time: number;
  tokens: number | null;
  running: number | null;
  waiting: number | null;
  ttft: number | null;
  itl: number | null;
  kvCache: number | null;
  prefixHits: number | null;
}

export interface Live {
  state: "connecting" | "live" | "lost";
  now: Snapshot | null;
  history: ReadonlyMap<string, Sample[]>;
}

const NOTHING: Live = { state: "connecting", now: null, history: new Map() };
export const LiveContext = createContext<Live>(NOTHING);
export const useLive = (): Live => useContext(LiveContext);

// Reads the stream of events for as long as the component is there, and begins again when it breaks off.
export function useEvents(): Live {
  const [live, setLive] = useState<Live>(NOTHING);

  useEffect(() => {
    const stop = new AbortController();
    const history = new Map<string, Sample[]>();
    let pause = 500;

    const read = async (): Promise<void> => {
      const response = await open("api/v1/events", { signal: stop.signal });
      for await (const { event, data } of events(response)) {
        if (event !== "state") continue;
        const now = JSON.parse(data) as Snapshot;
        remember(history, now);
        pause = 500;
        setLive({ state: "live", now, history });
      }
    };

    const follow = async (): Promise<void> => {
      while (!stop.signal.aborted) {
        try {
          await read();
        } catch (error) {
          // Only another key helps, and with that all begins anew.
          if (error instanceof ApiError && (error.status === 401 || error.status === 403)) return;
        }
        if (stop.signal.aborted) return;
        setLive((last) => ({ ...last, state: "lost" }));
        await new Promise((resolve) => setTimeout(resolve, pause));
        pause = Math.min(pause * 2, 8000);
      }
    };

    void follow();
    return () => stop.abort();
  }, []);

  return live;
}

function remember(history: Map<string, Sample[]>, now: Snapshot): void {
  const time = Date.parse(now.time) / 1000;
  for (const engine of now.engines) {
    const samples = history.get(engine.id) ?? [];
    samples.push(sample(engine, time));
    if (samples.length > KEPT) samples.shift();
    history.set(engine.id, samples);
  }
  const there = new Set(now.engines.map((engine) => engine.id));
  for (const id of history.keys()) if (!there.has(id)) history.delete(id);
}

const sample = (engine: Engine, time: number): Sample => ({
  time,
  tokens: engine.tokens_per_second,
  running: engine.running,
  waiting: engine.waiting,
  ttft: engine.ttft_seconds,
  itl: engine.itl_seconds,
  kvCache: engine.kv_cache_usage,
  prefixHits: engine.prefix_cache_hit_rate,
});
