// State that outlives the page that shows it, such as a conversation while one looks at the engines.

import { useEffect, useState } from "preact/hooks";

export class Store<State> {
  private readonly listeners = new Set<() => void>();

  constructor(private state: State) {}

  get(): State {
    return this.state;
  }

  set(change: Partial<State>): void {
    this.state = { ...this.state, ...change };
    for (const listener of this.listeners) listener();
  }

  listen(listener: () => void): () => void {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }
}

export function useStore<State>(store: Store<State>): State {
  const [, again] = useState({});
  useEffect(() => {
    const stop = store.listen(() => again({}));
    return () => void stop();
  }, [store]);
  return store.get();
}
