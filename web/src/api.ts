// Requests to the server that the page came from. The key is kept for this tab only and sent as a
// bearer token, so that no other page can have a browser send it.

const KEY = "vllm-key";

export const key = {
  get: (): string | null => sessionStorage.getItem(KEY),
  set: (value: string): void => sessionStorage.setItem(KEY, value),
  forget: (): void => sessionStorage.removeItem(KEY),
};

export class ApiError extends Error {
  constructor(
    readonly status: number,
    readonly reason: string,
    message: string,
  ) {
    super(message);
  }
}

// Who is told that a key is needed (401) or that this one may not (403).
let onRefused: (error: ApiError) => void = () => {};
export function whenRefused(tell: (error: ApiError) => void): void {
  onRefused = tell;
}

interface Request {
  method?: "GET" | "POST" | "DELETE";
  body?: unknown;
  signal?: AbortSignal;
}

// The answer to a request, once its status says that it is one. Paths are relative to the page, which may
// be served below a prefix.
export async function open(path: string, { method = "GET", body, signal }: Request = {}): Promise<Response> {
  const headers = new Headers();
  const bearer = key.get();
  if (bearer) headers.set("Authorization", `Bearer ${bearer}`);
  if (method === "DELETE") headers.set("X-Requested-With", "vllm");
  if (method === "POST") headers.set("Content-Type", "application/json");

  const response = await fetch(new URL(path, document.baseURI), {
    method,
    headers,
    body: method === "POST" ? JSON.stringify(body ?? {}) : undefined,
    signal,
    cache: "no-store",
  }).catch((error: unknown) => {
    if (signal?.aborted) throw error;
    throw new ApiError(0, "unreachable", "The server does not answer.");
  });

  if (response.ok) return response;
  const error = await refusal(response);
  if (response.status === 401 || error.reason === "forbidden") onRefused(error);
  throw error;
}

export async function ask<Answer>(path: string, request?: Request): Promise<Answer> {
  const response = await open(path, request);
  return (response.status === 204 ? null : await response.json()) as Answer;
}

export const get = <Answer>(path: string, signal?: AbortSignal): Promise<Answer> => ask(path, { signal });

export const post = <Answer>(path: string, body?: unknown, signal?: AbortSignal): Promise<Answer> =>
  ask(path, { method: "POST", body, signal });

// Both shapes of errors: this API's, and OpenAI's of /v1, which has the reason in `code`.
async function refusal(response: Response): Promise<ApiError> {
  const text = await response.text();
  try {
    const { reason, code, message } = JSON.parse(text).error;
    return new ApiError(response.status, reason ?? code ?? "error", message);
  } catch {
    return new ApiError(response.status, "error", `The server answered with status ${response.status}.`);
  }
}

// The events of a text/event-stream, as they come.
export async function* events(response: Response): AsyncGenerator<{ event: string; data: string }> {
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop()!;
      for (const block of blocks) {
        const event = parse(block);
        if (event.data) yield event;
      }
    }
  } finally {
    void reader.cancel().catch(() => {});
  }
}

function parse(block: string): { event: string; data: string } {
  let event = "message";
  const data: string[] = [];
  for (const line of block.split(/\r?\n/)) {
    if (line.startsWith("event:")) event = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
  }
  return { event, data: data.join("\n") };
}

export const message = (error: unknown): string => (error instanceof Error ? error.message : String(error));
