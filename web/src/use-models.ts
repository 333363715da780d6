import { useEffect, useState } from "preact/hooks";
import { get, message } from "./api";
import type { Model } from "./types";

interface Models {
  models: Model[] | null;
  refused: string | null;
  again: () => void;
}

// The models of this machine, read when the component comes and when it asks again.
export function useModels(): Models {
  const [models, setModels] = useState<Model[] | null>(null);
  const [refused, setRefused] = useState<string | null>(null);
  const [round, setRound] = useState(0);

  useEffect(() => {
    const stop = new AbortController();
    get<{ models: Model[] }>("api/v1/models", stop.signal).then(
      (answer) => setModels(answer.models),
      (error) => stop.signal.aborted || setRefused(message(error)),
    );
    return () => stop.abort();
  }, [round]);

  return { models, refused, again: () => setRound(round + 1) };
}
