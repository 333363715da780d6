import { useState } from "preact/hooks";
import type { ApiError } from "../api";
import { key } from "../api";
import { TextField } from "../parts/fields";

export function KeyPage({ refused, onKey }: { refused: ApiError; onKey: (value: string) => void }) {
  const [value, setValue] = useState("");
  const submit = (event: Event) => {
    event.preventDefault();
    if (value.trim()) onKey(value.trim());
  };

  return (
    <main class="key">
      <form class="card" onSubmit={submit}>
        <h1>VLLM</h1>
        <p>
          {key.get() === null
            ? "This server asks for a key that may administer it."
            : refused.status === 401
              ? "The server does not know this key."
              : refused.message}
        </p>
        <TextField
          label="Key"
          type="password"
          required
          hint="It is kept in this tab until it is closed, and sent to this server only."
          value={value}
          onChange={setValue}
        />
        <button type="submit" class="primary">
          Continue
        </button>
      </form>
    </main>
  );
}
