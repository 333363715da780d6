// A conversation with a model by OpenAI's API of this server, as it streams in.

import { events, message, open } from "./api";
import { options } from "./parts/options";
import { Store } from "./store";

export interface Turn {
  role: "user" | "assistant";
  model: string;
  text: string;
  reasoning: string;
  error?: string;
  finish?: string;
  // Seconds until the first token and until the end, and how many tokens there were.
  first?: number;
  seconds?: number;
  tokens?: number;
}

interface Talk {
  model: string;
  mode: "chat" | "prompt";
  system: string;
  parameters: Record<string, string>;
  // Further ones, one a line.
  lines: string;
  turns: Turn[];
  busy: boolean;
}

export const PARAMETERS = [
  { name: "max_tokens", label: "Most tokens", placeholder: "256" },
  { name: "temperature", label: "Temperature", placeholder: "default" },
  { name: "top_p", label: "Top p", placeholder: "default" },
  { name: "top_k", label: "Top k", placeholder: "default" },
  { name: "seed", label: "Seed", placeholder: "none" },
  { name: "stop", label: "Stop at", placeholder: "none" },
];

export const talk = new Store<Talk>({ model: "", mode: "chat", system: "", parameters: {}, lines: "", turns: [], busy: false });

let stopping: AbortController | null = null;
export const stop = (): void => stopping?.abort();
export const forget = (): void => talk.set({ turns: [] });

// Sends what was written, and adds what comes to the last turn.
export async function say(model: string, text: string): Promise<void> {
  const asked: Turn = { role: "user", model, text, reasoning: "" };
  const before = talk.get().mode === "chat" ? talk.get().turns.filter((turn) => !turn.error) : [];
  const answer: Turn = { role: "assistant", model, text: "", reasoning: "" };
  talk.set({ turns: [...talk.get().turns, asked, answer], busy: true, model });

  stopping = new AbortController();
  const start = performance.now();
  const since = () => (performance.now() - start) / 1000;
  try {
    const [path, body] = request(model, [...before, asked]);
    const response = await open(path, { method: "POST", body, signal: stopping.signal });
    for await (const { data } of events(response)) {
      if (data === "[DONE]") break;
      change(add(JSON.parse(data), since));
    }
  } catch (error) {
    if (!stopping.signal.aborted) change(() => ({ error: message(error) }));
    else change(() => ({ finish: "you" }));
  }
  change(() => ({ seconds: since() }));
  talk.set({ busy: false });
}

function change(by: (turn: Turn) => Partial<Turn>): void {
  const turns = [...talk.get().turns];
  const last = turns.pop()!;
  talk.set({ turns: [...turns, { ...last, ...by(last) }] });
}

function request(model: string, turns: Turn[]): [path: string, body: unknown] {
  const { mode, system, parameters, lines } = talk.get();
  const settings = {
    model,
    stream: true,
    stream_options: { include_usage: true },
    max_tokens: 256,
    ...options({ fields: parameters, lines }),
    // A text, also where it looks like a number.
    ...(parameters.stop && { stop: parameters.stop }),
  };

  if (mode === "prompt") return ["v1/completions", { ...settings, prompt: turns[turns.length - 1]!.text }];
  const messages = turns.map((turn) => ({ role: turn.role, content: turn.text }));
  return ["v1/chat/completions", { ...settings, messages: system ? [{ role: "system", content: system }, ...messages] : messages }];
}

// A chunk of a chat, of a completion, or an error in the middle of a stream.
interface Chunk {
  error?: { message: string };
  usage?: { completion_tokens: number } | null;
  choices?: {
    text?: string;
    delta?: { content?: string | null; reasoning?: string | null; reasoning_content?: string | null };
    finish_reason?: string | null;
  }[];
}

function add(chunk: Chunk, since: () => number): (turn: Turn) => Partial<Turn> {
  if (chunk.error) throw new Error(chunk.error.message);
  const choice = chunk.choices?.[0];
  const text = choice?.text ?? choice?.delta?.content ?? "";
  const reasoning = choice?.delta?.reasoning ?? choice?.delta?.reasoning_content ?? "";
  return (turn) => ({
    text: turn.text + text,
    reasoning: turn.reasoning + reasoning,
    first: turn.first ?? (text || reasoning ? since() : undefined),
    finish: choice?.finish_reason ?? turn.finish,
    tokens: chunk.usage?.completion_tokens ?? turn.tokens,
  });
}
