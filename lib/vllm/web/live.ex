defmodule VLLM.Web.Live do
  @moduledoc false
  # How all is now, for everybody who looks: whoever asks gets what is a second old
  # at most, so that engines are asked once a second however many look, and not at
  # all where nobody does.

  use GenServer

  alias VLLM.Bridge.Deadline
  alias VLLM.Engine.Table
  alias VLLM.Metrics.Engines
  alias VLLM.Web.{Figures, Machine}

  # For how long what was found holds, in ms, and what takes longer to find.
  @fresh 900
  @slow 5_000

  # How long replicas may take to answer, in ms.
  @patience 700

  # Over how much time a rate is told, in ms: longer is no rate of now.
  @longest 30_000

  @typedoc "Figures and memory by the keys of engines, jobs, and the machine, as far as it is known."
  @type t :: %{
          time: DateTime.t(),
          figures: %{term() => %{atom() => number() | nil}},
          memory: %{term() => [map()]},
          jobs: [VLLM.Job.t()],
          machine: Machine.t() | nil
        }

  def start_link(_none), do: GenServer.start_link(__MODULE__, nil, name: __MODULE__)

  @doc "How all is."
  @spec now() :: t()
  def now, do: GenServer.call(__MODULE__, :now, 30_000)

  @impl true
  def init(nil), do: {:ok, %{now: nil, at: nil, sums: %{}, slow: nil, slow_at: nil, task: nil}}

  @impl true
  def handle_call(:now, _from, state) do
    time = System.monotonic_time(:millisecond)
    state = if state.at && time - state.at < @fresh, do: state, else: look(state, time)
    {:reply, state.now, state}
  end

  @impl true
  def handle_info({ref, slow}, %{task: %{ref: ref}} = state) do
    Process.demonitor(ref, [:flush])
    {:noreply, %{state | slow: slow, task: nil}}
  end

  # It has failed: what was known holds on.
  def handle_info({:DOWN, ref, :process, _pid, _reason}, %{task: %{ref: ref}} = state),
    do: {:noreply, %{state | task: nil}}

  def handle_info(_late, state), do: {:noreply, state}

  defp look(state, time) do
    state = look_slowly(state, time)
    engines = @patience |> Deadline.new() |> Engines.now()
    sums = for engine <- engines, into: %{}, do: {engine.key, sums(engine)}
    seconds = if state.at && time - state.at < @longest, do: (time - state.at) / 1000
    before = if seconds, do: state.sums, else: %{}

    figures =
      for {key, now} <- sums, into: %{}, do: {key, Figures.new(now, before[key], seconds || 0.0)}

    slow = state.slow || %{memory: %{}, machine: nil}
    now = %{time: DateTime.utc_now(), figures: figures, jobs: VLLM.Job.list()}
    %{state | now: Map.merge(slow, now), at: time, sums: sums}
  end

  # What no worker tells is what this side knows.
  defp sums(engine) do
    sums = engine.replicas |> Enum.map(& &1.answer) |> Figures.sums()
    in_flight = engine.replicas |> Enum.map(& &1.in_flight) |> Enum.sum()

    if is_map_key(sums, :running),
      do: sums,
      else: Map.merge(sums, %{running: in_flight, waiting: 0})
  end

  defp look_slowly(%{task: nil} = state, time)
       when state.slow_at == nil or time - state.slow_at >= @slow do
    task = Task.Supervisor.async_nolink(VLLM.Web.Tasks, &slow/0)
    %{state | task: task, slow_at: time}
  end

  defp look_slowly(state, _time), do: state

  defp slow do
    machine = Machine.now()

    memory =
      for {key, table} <- Table.engines(),
          into: %{},
          do: {key, Machine.of_engine(key, table, machine)}

    %{machine: machine, memory: memory}
  end
end
