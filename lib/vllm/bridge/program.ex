defmodule VLLM.Bridge.Program do
  @moduledoc false
  # Starts the worker program under its guard, as an Erlang port, in a run
  # folder of its own; and makes sure that it is gone.
  #
  # The guard (vllm_bridge/guard.py) is the port program: it starts the worker,
  # writes what the worker prints to `log` in the run folder, and ends only when
  # every process of the run has. So the port's exit status says that all is
  # gone, and closing the port has the guard kill whatever runs.

  alias VLLM.{Data, Error, Python}

  @enforce_keys [:port, :os_pid, :run_dir, :python]
  defstruct @enforce_keys

  @type t :: %__MODULE__{
          port: port() | pid(),
          os_pid: non_neg_integer(),
          run_dir: Path.t(),
          python: Path.t()
        }

  @doc """
  Starts `program` (arguments for the virtual environment's Python) under a
  guard. The calling process owns the port.

  Options: `:python` (path of the interpreter; default: the one that
  `VLLM.Python.executable/0` finds), `:env` (map of environment variables, on
  top of the BEAM's), `:mode` (a function from the interpreter's path to options of
  the guard, see there).
  """
  @spec start([String.t()], keyword()) :: {:ok, t()} | {:error, Error.t()}
  def start(program \\ ["-m", "vllm_bridge"], opts \\ []) do
    with {:ok, python} <- interpreter(opts[:python]) do
      run_dir = Path.join(base_dir(), Base.url_encode64(:rand.bytes(9)))
      mode = if opts[:mode], do: opts[:mode].(python), else: []
      args = ["-I", "-S", guard()] ++ mode ++ [run_dir, "--", python | program]

      port =
        Port.open({:spawn_executable, python}, [
          :binary,
          :nouse_stdio,
          :exit_status,
          {:args, args},
          {:env, environment(opts[:env] || %{})}
        ])

      # Nil if it has ended already; its exit status is on the way.
      os_pid = with {:os_pid, os_pid} <- Port.info(port, :os_pid), do: os_pid
      {:ok, %__MODULE__{port: port, os_pid: os_pid || 0, run_dir: run_dir, python: python}}
    end
  rescue
    error in [ErlangError, ArgumentError] ->
      {:error,
       Error.new(
         :python_not_found,
         "Python could not be started (#{Exception.message(error)}). Run `mix vllm.doctor`."
       )}
  end

  defp interpreter(nil), do: Python.executable()
  defp interpreter(python) when is_binary(python), do: {:ok, python}

  defp environment(env) do
    %{
      # Only what is ours is on the worker's path: one of the user's shell or
      # packages in the home folder could bring another vLLM.
      "PYTHONPATH" => Python.path(),
      "PYTHONNOUSERSITE" => "1",
      "PYTHONHOME" => false,
      # Where models that were made here are found by their names.
      "EX_VLLM_DATA" => Data.dir(),
      # What quantizes a model before it is loaded (`isq`).
      "EX_VLLM_QUANTIZE_PYTHON" => quantizing(),
      # A segmentation fault says in the log where it was.
      "PYTHONFAULTHANDLER" => "1",
      # vLLM takes every VLLM_* for its own and warns of this one.
      "VLLM_VENV" => false
    }
    |> Map.merge(Map.new(env, fn {name, value} -> {to_string(name), value} end))
    |> Enum.map(fn
      {name, unset} when unset in [nil, false] -> {String.to_charlist(name), false}
      {name, value} -> {String.to_charlist(name), String.to_charlist(to_string(value))}
    end)
  end

  defp quantizing do
    case Python.executable(:quantize) do
      {:ok, python} -> python
      {:error, _not_installed} -> false
    end
  end

  @doc """
  The folder that holds the run folders of this user; short, because sockets
  below it must fit into 107 bytes.
  """
  @spec base_dir() :: Path.t()
  def base_dir do
    user = System.get_env("USER") || System.get_env("LOGNAME") || "user"
    base = Path.join(System.tmp_dir!(), "ex_vllm-" <> user)
    if byte_size(base) <= 50, do: base, else: Path.join("/tmp", "ex_vllm-" <> user)
  end

  @doc """
  Cleans up after a program whose exit status has come: removes the run folder,
  and, should the guard itself have been killed, whatever it could not.
  """
  @spec clean_up(t()) :: :ok
  def clean_up(%__MODULE__{run_dir: run_dir} = program) do
    if File.dir?(run_dir) and not File.exists?(Path.join(run_dir, "clean")) do
      finish(program)
      sweep(program)
    end

    # The lock last: without it, no sweep could go on where a BEAM that is killed here has ended.
    with {:ok, names} <- File.ls(run_dir) do
      for name <- names -- ["lock"], do: File.rm_rf(Path.join(run_dir, name))
    end

    _ = File.rm_rf(run_dir)
    :ok
  end

  # Removes what runs without a guard have left: processes, shared memory, folders.
  defp sweep(program) do
    args = ["-I", "-S", guard(), "--sweep", base_dir()]
    System.cmd(program.python, args, stderr_to_stdout: true)
  end

  defp guard, do: Path.join(Python.path(), "vllm_bridge/guard.py")

  @doc """
  Ends the program and returns when nothing of it is left.

  `ask` may tell the worker to end by itself; where that takes over two seconds
  it is killed. Called by the owner of the port; `clean_up/1` comes after it.
  """
  @spec stop(t(), (() -> term())) :: :ok
  def stop(%__MODULE__{port: port} = program, ask) do
    ask.()

    receive do
      {^port, {:exit_status, _}} -> :ok
    after
      2_000 -> kill(program)
    end
  end

  @doc "Has the guard kill every process of the program, and returns when nothing of it is left."
  @spec kill(t()) :: :ok
  def kill(%__MODULE__{} = program) do
    close(program.port)

    # A port with frames that a stopped worker will never read stays open, and
    # a guard that was stopped does not hear of it: then it is told.
    unless ended?(program.os_pid, 300) do
      finish(program)
      ended?(program.os_pid, 10_000)
    end

    :ok
  end

  # Has whatever guard the run has end it.
  defp finish(program) do
    args = ["-I", "-S", guard(), "--end", program.run_dir]
    System.cmd(program.python, args, stderr_to_stdout: true)
  end

  defp close(port) when is_port(port) do
    Port.close(port)
  rescue
    ArgumentError -> true
  end

  # The program of VLLM.Test.
  defp close(pid), do: Process.exit(pid, :kill)

  # A closed port tells no exit status, so the guard's end is looked for.
  defp ended?(guard, timeout) do
    ended_before?(guard, :erlang.monotonic_time(:millisecond) + timeout)
  end

  defp ended_before?(guard, deadline) do
    cond do
      not File.exists?("/proc/#{guard}") ->
        true

      :erlang.monotonic_time(:millisecond) >= deadline ->
        false

      true ->
        receive do
        after
          10 -> ended_before?(guard, deadline)
        end
    end
  end
end
