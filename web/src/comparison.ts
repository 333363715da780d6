// A comparison of models takes minutes: it goes on while other pages are shown.

import { message, post } from "./api";
import { Store } from "./store";
import type { ComparisonRow } from "./types";

interface Comparison {
  models: string[];
  started: number | null;
  rows: ComparisonRow[] | null;
  refused: string | null;
}

export const comparison = new Store<Comparison>({ models: [], started: null, rows: null, refused: null });

let stopping: AbortController | null = null;

export async function compare(models: string[]): Promise<void> {
  stopping = new AbortController();
  comparison.set({ models, started: Date.now(), rows: null, refused: null });
  try {
    const { rows } = await post<{ rows: ComparisonRow[] }>("api/v1/quantize/compare", { models }, stopping.signal);
    comparison.set({ rows });
  } catch (error) {
    if (!stopping.signal.aborted) comparison.set({ refused: message(error) });
  }
  comparison.set({ started: null });
}

export const stopComparing = (): void => stopping?.abort();
