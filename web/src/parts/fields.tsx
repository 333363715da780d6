// Fields of forms, each with its label and what there is to know of it.

import type { ComponentChildren } from "preact";
import { useId } from "preact/hooks";

interface FieldProps {
  label: string;
  hint?: ComponentChildren;
  value: string;
  onChange: (value: string) => void;
}

type TextProps = FieldProps & {
  placeholder?: string;
  required?: boolean;
  // Proposals.
  list?: string[];
  type?: "text" | "password" | "number";
  step?: string;
  min?: number;
  max?: number;
};

export function TextField({ label, hint, value, onChange, list, type = "text", ...rest }: TextProps) {
  const id = useId();
  return (
    <div class="field">
      <label for={id}>{label}</label>
      <input
        id={id}
        type={type}
        value={value}
        autocomplete="off"
        spellcheck={false}
        list={list && `${id}-list`}
        aria-describedby={hint ? `${id}-hint` : undefined}
        onInput={(event) => onChange(event.currentTarget.value)}
        {...rest}
      />
      {list && (
        <datalist id={`${id}-list`}>
          {list.map((one) => (
            <option key={one} value={one} />
          ))}
        </datalist>
      )}
      {hint && <Hint id={id}>{hint}</Hint>}
    </div>
  );
}

export function AreaField({ label, hint, value, onChange, rows = 3, placeholder }: FieldProps & { rows?: number; placeholder?: string }) {
  const id = useId();
  return (
    <div class="field">
      <label for={id}>{label}</label>
      <textarea
        id={id}
        rows={rows}
        value={value}
        placeholder={placeholder}
        spellcheck={false}
        aria-describedby={hint ? `${id}-hint` : undefined}
        onInput={(event) => onChange(event.currentTarget.value)}
      />
      {hint && <Hint id={id}>{hint}</Hint>}
    </div>
  );
}

export function SelectField({ label, hint, value, onChange, options }: FieldProps & { options: [value: string, text: string][] }) {
  const id = useId();
  return (
    <div class="field">
      <label for={id}>{label}</label>
      <select id={id} value={value} aria-describedby={hint ? `${id}-hint` : undefined} onChange={(event) => onChange(event.currentTarget.value)}>
        {options.map(([each, text]) => (
          <option key={each} value={each}>
            {text}
          </option>
        ))}
      </select>
      {hint && <Hint id={id}>{hint}</Hint>}
    </div>
  );
}

interface CheckProps {
  label: ComponentChildren;
  checked: boolean;
  onChange: (checked: boolean) => void;
  disabled?: boolean;
  class?: string;
}

export function Check({ label, checked, onChange, disabled, class: name = "check" }: CheckProps) {
  return (
    <label class={name}>
      <input type="checkbox" checked={checked} disabled={disabled} onChange={(event) => onChange(event.currentTarget.checked)} />
      <span>{label}</span>
    </label>
  );
}

function Hint({ id, children }: { id: string; children: ComponentChildren }) {
  return (
    <p class="hint" id={`${id}-hint`}>
      {children}
    </p>
  );
}
