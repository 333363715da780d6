import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { get, message } from "../api";

const EVERY_MS = 2000;

// The last lines of a log, read again every two seconds. It stays at its end unless one scrolls up.
export function LiveLog({ path, label }: { path: string; label: string }) {
  const [lines, setLines] = useState<string[] | null>(null);
  const [refused, setRefused] = useState<string | null>(null);

  useEffect(() => {
    const stop = new AbortController();
    let timer: number;
    const read = async () => {
      try {
        setLines((await get<{ lines: string[] }>(path, stop.signal)).lines);
        setRefused(null);
      } catch (error) {
        if (!stop.signal.aborted) setRefused(message(error));
      }
      if (!stop.signal.aborted) timer = window.setTimeout(read, EVERY_MS);
    };
    void read();
    return () => {
      stop.abort();
      clearTimeout(timer);
    };
  }, [path]);

  if (refused) return <p class="note bad">{refused}</p>;
  return <Lines lines={lines ?? []} label={label} empty={lines ? "Nothing was logged." : "Reading…"} />;
}

export function Lines({ lines, label, empty = "" }: { lines: string[]; label: string; empty?: string }) {
  const box = useRef<HTMLPreElement>(null);
  const atEnd = useRef(true);

  useLayoutEffect(() => {
    if (atEnd.current) box.current!.scrollTop = box.current!.scrollHeight;
  }, [lines]);

  const scrolled = () => {
    const { scrollTop, scrollHeight, clientHeight } = box.current!;
    atEnd.current = scrollHeight - scrollTop - clientHeight < 24;
  };

  return (
    <pre class="log" ref={box} tabIndex={0} role="region" aria-label={label} onScroll={scrolled}>
      {lines.length > 0 ? lines.join("\n") : empty}
    </pre>
  );
}
