// What the page has to say, which screen readers hear, too. What went wrong stays until it is closed.

import { useEffect } from "preact/hooks";
import { message } from "../api";
import { Store, useStore } from "../store";

interface Notice {
  id: number;
  text: string;
  bad: boolean;
}

const notices = new Store<{ shown: Notice[] }>({ shown: [] });
const SHOWN_MS = 6000;
let next = 0;

const close = (id: number) => notices.set({ shown: notices.get().shown.filter((one) => one.id !== id) });

export function notify(text: string, bad = false): void {
  next += 1;
  notices.set({ shown: [...notices.get().shown.slice(-2), { id: next, text, bad }] });
}

// Does something, and says what came of it.
export async function attempt(work: Promise<unknown>, done?: string): Promise<void> {
  try {
    await work;
    if (done) notify(done);
  } catch (error) {
    notify(message(error), true);
  }
}

export function Notices() {
  const { shown } = useStore(notices);
  return (
    <div class="notices" role="status" aria-live="polite">
      {shown.map((notice) => (
        <One key={notice.id} notice={notice} />
      ))}
    </div>
  );
}

function One({ notice: { id, text, bad } }: { notice: Notice }) {
  useEffect(() => {
    if (bad) return undefined;
    const timer = setTimeout(() => close(id), SHOWN_MS);
    return () => clearTimeout(timer);
  }, [id, bad]);
  return (
    <div class={`notice ${bad ? "bad" : ""}`}>
      <span>{text}</span>
      <button type="button" class="plain" aria-label="Close" onClick={() => close(id)}>
        ×
      </button>
    </div>
  );
}
