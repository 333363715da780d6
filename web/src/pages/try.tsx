import { useEffect, useRef, useState } from "preact/hooks";
import { latency, number } from "../format";
import { useLive } from "../live";
import { AreaField, SelectField, TextField } from "../parts/fields";
import { useStore } from "../store";
import type { Turn } from "../talk";
import { forget, PARAMETERS, say, stop, talk } from "../talk";

// A conversation with a model, or a prompt that it continues.
export function TryPage({ model: asked }: { model?: string }) {
  const { now } = useLive();
  const { model, mode, turns, busy } = useStore(talk);
  const served = (now?.engines ?? []).filter((engine) => engine.served_name !== null);
  const names = [...new Set(served.map((engine) => engine.served_name!))];
  const chosen = names.includes(model) ? model : asked && names.includes(asked) ? asked : (names[0] ?? "");

  useEffect(() => {
    if (asked) talk.set({ model: asked });
  }, [asked]);

  return (
    <>
      <div class="head">
        <h1 tabIndex={-1}>Try</h1>
        <button type="button" disabled={turns.length === 0 || busy} onClick={forget}>
          Begin anew
        </button>
      </div>
      {now && names.length === 0 && (
        <p class="card empty">This server serves no engine as OpenAI's API. Engines are listed in its option `models`, and those started here are.</p>
      )}
      <div class="try">
        <section class="talk" aria-label={mode === "chat" ? "Conversation" : "Prompt and completion"}>
          <div class="turns" role="log" aria-live="polite" aria-busy={busy}>
            {turns.length === 0 && <p class="muted">{mode === "chat" ? "Say something to the model." : "Write the beginning of a text, which the model goes on with."}</p>}
            {turns.map((turn, n) => (
              <OneTurn key={n} turn={turn} />
            ))}
          </div>
          <Composer model={chosen} />
        </section>
        <aside class="card fields" aria-label="Parameters">
          <SelectField label="Model" value={chosen} onChange={(value) => talk.set({ model: value })} options={names.map((name) => [name, name])} />
          <SelectField
            label="As"
            value={mode}
            onChange={(value) => talk.set({ mode: value as "chat" | "prompt", turns: [] })}
            options={[
              ["chat", "a chat"],
              ["prompt", "a prompt to go on with"],
            ]}
          />
          <Parameters />
        </aside>
      </div>
    </>
  );
}

function Parameters() {
  const { mode, system, parameters, lines } = useStore(talk);
  return (
    <>
      {mode === "chat" && <AreaField label="System" rows={2} placeholder="none" value={system} onChange={(value) => talk.set({ system: value })} />}
      <div class="columns">
        {PARAMETERS.map(({ name, label, placeholder }) => (
          <TextField
            key={name}
            label={label}
            placeholder={placeholder}
            value={parameters[name] ?? ""}
            onChange={(value) => talk.set({ parameters: { ...parameters, [name]: value } })}
          />
        ))}
      </div>
      <AreaField
        label="Further parameters"
        rows={2}
        placeholder="ignore_eos: true"
        hint="One a line, by vLLM's names."
        value={lines}
        onChange={(value) => talk.set({ lines: value })}
      />
    </>
  );
}

function Composer({ model }: { model: string }) {
  const { busy, mode } = useStore(talk);
  const [text, setText] = useState("");
  const form = useRef<HTMLFormElement>(null);

  const submit = (event: Event) => {
    event.preventDefault();
    if (busy || !model || !text) return;
    void say(model, text);
    setText("");
  };

  return (
    <form class="composer" ref={form} onSubmit={submit}>
      <textarea
        rows={2}
        aria-label={mode === "chat" ? "Message" : "Prompt"}
        placeholder={mode === "chat" ? "Message" : "Prompt"}
        value={text}
        onInput={(event) => setText(event.currentTarget.value)}
        onKeyDown={(event) => {
          if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
          event.preventDefault();
          form.current!.requestSubmit();
        }}
      />
      {busy ? (
        <button type="button" onClick={stop}>
          Stop
        </button>
      ) : (
        <button type="submit" class="primary" disabled={!model || !text}>
          Send
        </button>
      )}
    </form>
  );
}

function OneTurn({ turn }: { turn: Turn }) {
  const { first, seconds, tokens } = turn;
  return (
    <article class={`turn ${turn.role}`}>
      <h2 class="muted">{turn.role === "user" ? "You" : turn.model}</h2>
      {turn.reasoning && <p class="reasoning">{turn.reasoning}</p>}
      <p class="text">{turn.text}</p>
      {turn.error && <p class="note bad">{turn.error}</p>}
      {seconds !== undefined && (
        <p class="muted measure">
          {first !== undefined && `first token after ${latency(first)}`}
          {tokens !== undefined && ` · ${tokens} tokens`}
          {tokens !== undefined && tokens > 1 && first !== undefined && ` · ${number((tokens - 1) / (seconds - first))} tokens/s`}
          {turn.finish && ` · ended by ${turn.finish}`}
        </p>
      )}
    </article>
  );
}
