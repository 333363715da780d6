import { useEffect, useRef, useState } from "preact/hooks";
import type { ApiError } from "./api";
import { key, whenRefused } from "./api";
import { LiveContext, useEvents } from "./live";
import { Notices } from "./parts/notices";
import { ComparePage } from "./pages/compare";
import { EnginePage } from "./pages/engine";
import { EnginesPage } from "./pages/engines";
import { JobsPage } from "./pages/jobs";
import { KeyPage } from "./pages/key";
import { ModelsPage } from "./pages/models";
import { SizingPage } from "./pages/sizing";
import { TryPage } from "./pages/try";
import { WizardPage } from "./pages/wizard";
import { useRoute } from "./route";
import { PAGES, Side } from "./side";

// The page, or the question for a key where the server wants one.
export function App() {
  const [refused, setRefused] = useState<ApiError | null>(null);

  useEffect(() => whenRefused(setRefused), []);

  if (refused) {
    const enter = (value: string) => {
      key.set(value);
      setRefused(null);
    };
    return <KeyPage refused={refused} onKey={enter} />;
  }
  return <Dashboard />;
}

function Dashboard() {
  const live = useEvents();
  const route = useRoute();
  const main = useRef<HTMLElement>(null);
  const place = route.join("/");
  const first = useRef(true);

  // Whoever goes to another page by keyboard or ear is at its heading then.
  useEffect(() => {
    const heading = main.current!.querySelector("h1");
    document.title = `${PAGES.find(([page]) => page === route[0])?.[1] ?? "Engines"} · VLLM`;
    if (first.current) first.current = false;
    else {
      heading?.focus();
      scrollTo(0, 0);
    }
  }, [place]);

  return (
    <LiveContext.Provider value={live}>
      <a class="skip" href="#main" onClick={(event) => (event.preventDefault(), main.current!.focus())}>
        Skip to the content
      </a>
      <Side route={route} />
      <main id="main" ref={main} tabIndex={-1}>
        {live.state === "lost" && (
          <p class="note warn" role="status">
            The connection to the server is lost. Figures are those of before; it is tried again.
          </p>
        )}
        <Page route={route} />
      </main>
      <Notices />
    </LiveContext.Provider>
  );
}

function Page({ route: [page, detail] }: { route: string[] }) {
  switch (page) {
    case "try":
      return <TryPage model={detail} />;
    case "sizing":
      return <SizingPage model={detail} />;
    case "quantize":
      return detail === "new" ? <WizardPage /> : <JobsPage />;
    case "models":
      return <ModelsPage />;
    case "compare":
      return <ComparePage />;
    default:
      return detail === undefined ? <EnginesPage /> : <EnginePage key={detail} id={detail} />;
  }
}
