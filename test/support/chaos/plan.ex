defmodule VLLM.Chaos.Plan do
  @moduledoc """
  What is asked and what goes wrong, all of it from one seed.

  Faults of processes come one after another, each some time after the one before; beside them,
  operations on the engine. Faults of callers belong to a request by its number.
  """

  @enforce_keys [:seed, :requests, :processes, :operations, :callers]
  defstruct @enforce_keys

  # How a process is hit: killed, stopped for a while, or stopped until somebody finds out.
  @signals [:kill, :stop, :kill, :stop, :hang]

  @doc """
  The plan of `seed`: so many `:requests` at least, so many `:faults`, of which `:processes` hit
  those of the `:victims`, and so many `:operations`.
  """
  def new(seed, options) do
    %{requests: requests, faults: faults, processes: processes} = options = Map.new(options)

    hits =
      for signal <- @signals,
          victim <- options.victims,
          # Nobody waits for a guard.
          {signal, victim} != {:hang, :guard},
          do: {victim, signal}

    %__MODULE__{
      seed: seed,
      requests: requests,
      processes:
        for {{{victim, signal}, n}, _} <- shuffle(spread(hits, processes), {seed, :processes}) do
          %{
            victim: victim,
            signal: signal,
            # A third of them hit whatever has started last, be it ready or not.
            moment: moment(signal, draw({seed, :moment, n}, 3)),
            # Which of the runs.
            run: draw({seed, :run, n}, 1000),
            # A stopped process goes on after so many milliseconds.
            resume: 100 + draw({seed, :resume, n}, 1500),
            # The milliseconds before it, in thousandths of the usual.
            pause: draw({seed, :pause, n}, 2000)
          }
        end,
      operations:
        for {operation, n} <- spread([:restart, :drain, :scale, :reload], options.operations) do
          %{operation: operation, replica: draw({seed, :replica, n}, 1000)}
        end,
      callers:
        for {{number, _}, {kind, _}} <-
              Enum.zip(
                shuffle(1..requests, {seed, :numbers}),
                spread([:death, :cancel, :deadline, :malformed], faults - processes)
              ),
            into: %{} do
          {number, kind}
        end
    }
  end

  # What has not loaded yet may hang for as long as loading may take.
  defp moment(:hang, _), do: :serving
  defp moment(_signal, 0), do: :started
  defp moment(_signal, _), do: :serving

  @doc "A number below `limit` that depends on nothing but `what`."
  def draw(what, limit), do: :erlang.phash2(what, limit)

  @doc "One of `list` for the request of that number."
  def pick(plan, number, what, list) do
    Enum.at(list, draw({plan.seed, number, what}, length(list)))
  end

  defp spread(_kinds, 0), do: []

  defp spread(kinds, count),
    do: kinds |> Stream.cycle() |> Stream.with_index() |> Enum.take(count)

  defp shuffle(list, salt) do
    list |> Enum.map(&{&1, draw({salt, &1}, 1_000_000_000)}) |> Enum.sort_by(&elem(&1, 1))
  end
end
