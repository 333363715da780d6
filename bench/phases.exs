# Where the seconds of a start go: how long an engine of the demo model is in each phase that it logs,
# for the first start of a BEAM, the next ones, and those without a nursery. And how long the imports
# take by package, in a Python of its own.
#
#     mix run bench/phases.exs

defmodule Phases do
  @behaviour :gen_event

  @phases [
            "starting Python",
            "importing vLLM",
            "reading the model's config",
            "starting the engine"
          ] ++
            ["loading weights", "warming up", "ready"]

  def init(pid), do: {:ok, pid}
  def handle_call(_, pid), do: {:ok, :ok, pid}

  def handle_event({_level, _leader, {Logger, text, _time, _metadata}}, pid) do
    text = IO.chardata_to_string(text)
    for phase <- @phases, String.ends_with?(text, ": " <> phase), do: send(pid, {phase, now()})
    {:ok, pid}
  end

  def handle_event(_, pid), do: {:ok, pid}

  def now, do: System.monotonic_time(:millisecond)

  def of_start(options) do
    began = now()

    options =
      [enforce_eager: true, kv_cache_memory_bytes: 268_435_456, progress: false] ++ options

    llm = VLLM.llm!(Application.app_dir(:ex_vllm, "priv/models/demo"), options)
    Logger.flush()
    VLLM.stop(llm)
    moments = moments([{"before it begins", began}])
    ends = tl(moments) ++ [{"", elem(List.last(moments), 1)}]

    for {{phase, from}, {_, to}} <- Enum.zip(moments, ends), phase != "ready" do
      {phase, to - from}
    end
  end

  defp moments(found) do
    receive do
      {phase, at} -> moments([{phase, at} | found])
    after
      0 -> Enum.reverse(found)
    end
  end
end

Logger.configure(level: :info)
Logger.remove_backend(:console)
:gen_event.add_handler(Logger, {Phases, :it}, self())

starts = [{"first", []}, {"next", []}, {"next", []}, {"alone", [nursery: false]}]

for {name, options} <- starts do
  phases = Phases.of_start(options)
  total = phases |> Enum.map(&elem(&1, 1)) |> Enum.sum()

  IO.puts(
    "| #{name} | #{total} ms | #{Enum.map_join(phases, ", ", fn {p, t} -> "#{p} #{t}" end)} |"
  )
end
