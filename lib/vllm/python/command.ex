defmodule VLLM.Python.Command do
  @moduledoc false
  # Runs the programs of a set-up, which take minutes and start others, under a
  # guard: they end with the BEAM, however it ends. And ends what is left where
  # the guard was killed too.

  alias VLLM.Bridge.{Log, Program}
  alias VLLM.Error

  # Every process of a set-up has this variable, with the environment that it makes.
  @mark "EX_VLLM_SETUP"

  # How often the output is looked at.
  @look_ms 100

  # pip is silent for minutes while it downloads or unpacks something large.
  @heartbeat_ms 10_000

  # How long a process may take to end by itself.
  @patience_ms 5_000

  @doc """
  Runs `python` with `args` for the virtual environment in `venv`.

  Gives every line that it prints to `on_line`, and `:heartbeat` where it has
  been silent for long. `env` are more variables for it. Returns all lines, with
  the exit status as the last one where that is not 0.
  """
  @spec run(Path.t(), Path.t(), [String.t()], (String.t() | :heartbeat -> term()), map()) ::
          {:ok | :error, [String.t()]}
  def run(venv, python, args, on_line \\ fn _ -> :ok end, env \\ %{}) do
    # What the caller's shell may have set for another Python does not count.
    env = Map.merge(env, %{"PYTHONPATH" => nil, "PIP_USER" => "no", @mark => venv})

    case Program.start(args, python: python, env: env) do
      {:ok, program} ->
        result = follow(program.port, Log.new(program.run_dir), on_line, [], now())
        Program.clean_up(program)
        result

      {:error, error} ->
        {:error, [error.message]}
    end
  end

  defp follow(port, log, on_line, lines, spoke) do
    receive do
      {^port, {:exit_status, status}} ->
        {_log, lines, _} = read(log, on_line, lines, spoke)
        lines = if status == 0, do: lines, else: ["exit status #{status}" | lines]
        {if(status == 0, do: :ok, else: :error), Enum.reverse(lines)}
    after
      @look_ms ->
        {log, lines, spoke} = read(log, on_line, lines, spoke)

        if now() - spoke > @heartbeat_ms do
          on_line.(:heartbeat)
          follow(port, log, on_line, lines, now())
        else
          follow(port, log, on_line, lines, spoke)
        end
    end
  end

  defp read(log, on_line, lines, spoke) do
    {new, log} = Log.read(log)
    Enum.each(new, on_line)
    {log, Enum.reverse(new, lines), if(new == [], do: spoke, else: now())}
  end

  defp now, do: System.monotonic_time(:millisecond)

  @doc """
  Ends what another set-up of the environment has left, and returns when it is
  gone. For who knows that no other one runs.
  """
  @spec end_leftovers(Path.t()) :: :ok | {:error, Error.t()}
  def end_leftovers(venv) do
    # A guard that is told to end clears away all that is below it.
    with [_ | _] = pids <- leftovers(venv),
         [_ | _] = pids <- signalled(pids, venv, "TERM", now() + @patience_ms),
         [_ | _] = pids <- signalled(pids, venv, "KILL", now() + @patience_ms) do
      {:error,
       Error.new(
         :vllm_not_installed,
         "An earlier set-up of #{venv} was killed, and what it has left does not end " <>
           "(processes #{Enum.join(pids, ", ")}). A disk may be stuck. Try again when they are gone.",
         %{"venv" => venv, "processes" => pids}
       )}
    else
      [] -> :ok
    end
  end

  # Those that are there still at the deadline. On a busy machine one look may take as long.
  defp signalled(pids, venv, signal, deadline) do
    System.cmd("kill", ["-" <> signal | pids], stderr_to_stdout: true)
    Process.sleep(@look_ms)
    pids = leftovers(venv)

    if pids == [] or now() > deadline,
      do: pids,
      else: signalled(pids, venv, signal, deadline)
  end

  defp leftovers(venv) do
    mark = "#{@mark}=#{venv}"

    for pid <- File.ls!("/proc"),
        pid =~ ~r/^\d+$/,
        {:ok, environ} <- [File.read("/proc/#{pid}/environ")],
        mark in String.split(environ, <<0>>),
        do: pid
  end
end
