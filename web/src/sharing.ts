// Uploads to the hub, which go on while other pages are shown.

import { ApiError, events, message, open } from "./api";
import { Store } from "./store";
import type { Options, Refusal, UploadProgress } from "./types";

export interface Upload {
  id: number;
  model: string;
  repository: string;
  progress: UploadProgress | null;
  // Where it is, once it is there.
  url: string | null;
  refused: string | null;
  stop: () => void;
}

export const sharing = new Store<{ uploads: Upload[] }>({ uploads: [] });
let next = 0;

const change = (id: number, by: Partial<Upload>): void =>
  sharing.set({ uploads: sharing.get().uploads.map((one) => (one.id === id ? { ...one, ...by } : one)) });

export const forget = (id: number): void => sharing.set({ uploads: sharing.get().uploads.filter((one) => one.id !== id) });

// Resolves when it has begun; what is refused before is thrown.
export async function share(model: string, repository: string, options: Options): Promise<void> {
  const stopping = new AbortController();
  const response = await open("api/v1/models/push", { method: "POST", body: { model, repository, options }, signal: stopping.signal });
  next += 1;
  const id = next;
  const stop = () => {
    stopping.abort();
    forget(id);
  };
  sharing.set({ uploads: [...sharing.get().uploads, { id, model, repository, progress: null, url: null, refused: null, stop }] });
  void follow(id, response, stopping.signal);
}

async function follow(id: number, response: Response, signal: AbortSignal): Promise<void> {
  try {
    for await (const { event, data } of events(response)) {
      const told: unknown = JSON.parse(data);
      if (event === "progress") change(id, { progress: told as UploadProgress });
      else if (event === "done") return change(id, told as { url: string });
      else if (event === "error") throw new ApiError(0, (told as Refusal).reason, (told as Refusal).message);
    }
    throw new ApiError(0, "unreachable", "The connection broke off. What the hub has is not sent again.");
  } catch (error) {
    if (!signal.aborted) change(id, { refused: message(error) });
  }
}
