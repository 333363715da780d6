defmodule VLLM.Bridge.Nursery do
  @moduledoc false
  # Keeps a process that has imported torch and vLLM and forks workers, so that
  # a worker begins in a moment (see vllm_bridge/nursery.py). There is one for each
  # interpreter and environment of the BEAM; it is started for the first worker
  # and ends a while after the last.
  #
  # A worker needs none: where there is no nursery, or it does not take the run,
  # the guard starts the worker itself.

  use GenServer, restart: :temporary

  require Logger

  alias VLLM.Bridge.{Deadline, ExitStatus, Log, Program}

  # How long one is kept for whoever comes next, in ms.
  @linger 300_000

  # How long its guard may take to begin, in ms.
  @patience 5_000

  @doc """
  The options that have a guard ask the nursery for a worker of this interpreter;
  none where it has to start the worker itself. The nursery is kept for as long as
  the calling process lives.
  """
  @spec mode(Path.t(), Enumerable.t()) :: [String.t()]
  def mode(python, env) do
    # A fork has the environment of the nursery, which is the BEAM's own.
    socket = if Enum.empty?(env), do: socket(python)
    if socket, do: ["--nursery", socket], else: []
  end

  defp socket(python) do
    # What a library reads while it is loaded cannot be changed in a fork.
    key = {:nursery, python, :erlang.md5(:erlang.term_to_binary(System.get_env()))}

    with pid when is_pid(pid) <- find(key) || start(key, python) do
      GenServer.call(pid, :join)
    end
  catch
    # It is ending.
    :exit, _ -> nil
  end

  defp find(key) do
    with [{pid, _}] <- Registry.lookup(VLLM.Registry, key), do: pid, else: ([] -> nil)
  end

  defp start(key, python) do
    # The environment has changed: those that nobody uses are of no use.
    for {_, pid, _, _} <- DynamicSupervisor.which_children(VLLM.NurserySupervisor),
        is_pid(pid),
        do: send(pid, :linger)

    case DynamicSupervisor.start_child(VLLM.NurserySupervisor, {__MODULE__, {key, python}}) do
      {:ok, pid} -> pid
      {:error, {:already_started, pid}} -> pid
      {:error, _} -> nil
    end
  end

  def start_link({key, python}) do
    GenServer.start_link(__MODULE__, python, name: {:via, Registry, {VLLM.Registry, key}})
  end

  @impl true
  def init(python) do
    Process.flag(:trap_exit, true)

    case Program.start(["-m", "vllm_bridge", "nursery"],
           python: python,
           mode: fn _ -> ["--alone"] end
         ) do
      {:ok, program} ->
        await_lock(program, Deadline.new(@patience))
        {:ok, %{program: program, users: MapSet.new(), timer: nil}}

      {:error, error} ->
        {:stop, {:shutdown, error}}
    end
  end

  # Where the folder of a run has no lock, a guard takes the run for over.
  defp await_lock(%{port: port} = program, deadline) do
    unless File.exists?(Path.join(program.run_dir, "lock")) or
             Deadline.passed?(deadline) do
      receive do
        # It has ended already; what that means is said in one place.
        {^port, {:exit_status, _}} = ended -> send(self(), ended)
      after
        5 -> await_lock(program, deadline)
      end
    end
  end

  @impl true
  def handle_call(:join, {pid, _}, state) do
    if state.timer, do: Process.cancel_timer(state.timer)
    state = %{state | users: MapSet.put(state.users, Process.monitor(pid)), timer: nil}
    {:reply, Path.join([state.program.run_dir, "tmp", "nursery"]), state}
  end

  @impl true
  def handle_info({:DOWN, monitor, :process, _, _}, state) do
    users = MapSet.delete(state.users, monitor)
    timer = if users == MapSet.new(), do: Process.send_after(self(), :linger, @linger)
    {:noreply, %{state | users: users, timer: timer}}
  end

  def handle_info(:linger, state) do
    if state.timer, do: {:stop, :normal, state}, else: {:noreply, state}
  end

  def handle_info({port, {:exit_status, status}}, %{program: %{port: port}} = state) do
    # What its Python lacks is said of the worker that is started instead.
    unless ExitStatus.error(status, []).reason == :vllm_not_installed do
      {_, log} = Log.read(Log.new(state.program.run_dir))

      Logger.warning(fn ->
        "The process that workers are forked from ended with status #{status}; workers start " <>
          "without it until the next one is there.\n" <> Enum.join(Log.recent(log), "\n")
      end)
    end

    {:stop, :normal, state}
  end

  def handle_info(_message, state), do: {:noreply, state}

  @impl true
  def terminate(_reason, state) do
    Program.kill(state.program)
    Program.clean_up(state.program)
  end
end
