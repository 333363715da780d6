// The options of an engine: the usual ones as fields, all others as lines.

import type { Options } from "../types";
import { AreaField, TextField } from "./fields";

export interface Draft {
  fields: Record<string, string>;
  lines: string;
}

export const NO_OPTIONS: Draft = { fields: {}, lines: "" };

const USUAL: [name: string, label: string, placeholder: string][] = [
  ["max_model_len", "Longest context, in tokens", "the model's own"],
  ["gpu_memory_utilization", "Share of the memory", "vLLM's own"],
  ["quantization", "Quantization", "as detected"],
  ["kv_cache_dtype", "Type of the KV cache", "auto"],
  ["tensor_parallel_size", "Devices for each layer", "1"],
  ["replicas", "Replicas", "1"],
];

interface Props {
  draft: Draft;
  onChange: (draft: Draft) => void;
  // Those of the usual ones that make no sense here.
  without?: string[];
}

export function OptionFields({ draft, onChange, without = [] }: Props) {
  return (
    <>
      <div class="columns">
        {USUAL.filter(([name]) => !without.includes(name)).map(([name, label, placeholder]) => (
          <TextField
            key={name}
            label={label}
            placeholder={placeholder}
            value={draft.fields[name] ?? ""}
            onChange={(value) => onChange({ ...draft, fields: { ...draft.fields, [name]: value } })}
          />
        ))}
      </div>
      <AreaField
        label="Further options"
        rows={2}
        placeholder="enforce_eager: true"
        hint="One a line, by vLLM's names; what vLLM does not know is refused."
        value={draft.lines}
        onChange={(lines) => onChange({ ...draft, lines })}
      />
    </>
  );
}

// What is to be sent; raises an error that says which line is none.
export function options({ fields, lines }: Draft): Options {
  const given = Object.entries(fields).filter(([, text]) => text.trim() !== "");
  for (const line of lines.split("\n").filter((one) => one.trim() !== "")) {
    const [, name, text] = /^\s*(\w+)\s*[:=]\s*(.+?)\s*$/.exec(line) ?? [];
    if (name === undefined || text === undefined) throw new Error(`“${line.trim()}” is no option: write its name, a colon and its value.`);
    given.push([name, text]);
  }
  return Object.fromEntries(given.map(([name, text]) => [name, value(text.trim())]));
}

// Numbers, truth values, lists and maps as in JSON; all else is a text.
export function value(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}
