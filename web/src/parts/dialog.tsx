import type { ComponentChildren } from "preact";
import { useEffect, useId, useRef, useState } from "preact/hooks";
import { message } from "../api";

interface DialogProps {
  title: string;
  // The word on the button that does it.
  action: string;
  danger?: boolean;
  onClose: () => void;
  // What it does. The dialog closes once that is done, and shows why where it is not.
  onAction: () => Promise<unknown>;
  children: ComponentChildren;
}

// The browser's own modal dialog: it keeps the focus, gives it back when it is closed, and closes on Escape.
export function Dialog({ title, action, danger, onClose, onAction, children }: DialogProps) {
  const element = useRef<HTMLDialogElement>(null);
  const heading = useId();
  const [busy, setBusy] = useState(false);
  const [refused, setRefused] = useState<string | null>(null);

  useEffect(() => element.current!.showModal(), []);

  const submit = async (event: Event) => {
    event.preventDefault();
    setBusy(true);
    setRefused(null);
    try {
      await onAction();
      element.current?.close();
    } catch (error) {
      setRefused(message(error));
      setBusy(false);
    }
  };

  return (
    <dialog ref={element} aria-labelledby={heading} onClose={onClose}>
      <form onSubmit={submit}>
        <h2 id={heading}>{title}</h2>
        <div class="fields">{children}</div>
        {refused && (
          <p class="note bad" role="alert">
            {refused}
          </p>
        )}
        <div class="actions end">
          <button type="button" onClick={() => element.current!.close()}>
            Cancel
          </button>
          <button type="submit" class={danger ? "danger" : "primary"} disabled={busy}>
            {action}
          </button>
        </div>
      </form>
    </dialog>
  );
}
