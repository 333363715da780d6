defmodule Mix.Tasks.Vllm.Doctor do
  @shortdoc "Looks for what could keep vLLM from working on this machine"

  @moduledoc """
  Looks for what could keep vLLM from working on this machine.

      mix vllm.doctor [--fix]

  Prints a line for each check (versions, the Python environment, which extras
  are installed and which quantizations run, the device, memory, disk, the
  Hugging Face settings, and a greeting exchanged with a real worker) and a remedy below each warning and problem. Ends with status 1 where
  there is a problem, that is where generation could not work.

  With `--fix` it first runs the set-up of `mix vllm.setup` for what is missing of the Python
  side: the environment, where there is none, or it is not complete, or cannot be run, or has
  another vLLM; and the extras (`mix vllm.setup --with`), all of them, about 150 MB. A Python of
  your own (`config :ex_vllm, python: ...`) and an environment that you made are not touched.

  Tokens are never printed.
  """

  use Mix.Task

  alias Mix.Tasks.Vllm.Setup
  alias VLLM.Doctor

  @requirements ["app.config"]

  @impl Mix.Task
  def run(argv) do
    case argv do
      [] -> :ok
      ["--fix"] -> fix(Doctor.system())
      _ -> Mix.raise("mix vllm.doctor takes no argument but --fix")
    end

    report(Doctor.system())
  end

  @doc false
  @spec fix(Doctor.system()) :: :ok
  def fix(system) do
    case Doctor.fixes(system) do
      {:ok, opts} -> Setup.install(opts)
      {:error, error} -> Mix.raise(error.message)
    end
  end

  @doc false
  @spec report(Doctor.system()) :: :ok
  def report(system) do
    counts = system |> Doctor.checks() |> Enum.map(&print/1) |> Enum.frequencies()

    case counts do
      %{problem: count} ->
        Mix.shell().error("Generation cannot work here: #{count} to mend (see above).")
        exit({:shutdown, 1})

      _ ->
        Mix.shell().info("vLLM can work here.")
    end
  end

  @marks %{ok: {:green, "ok"}, warning: {:yellow, "warning"}, problem: {:red, "problem"}}

  defp print(check) do
    {colour, mark} = @marks[check.status]
    name = String.pad_trailing(check.name, 17)
    Mix.shell().info([colour, String.pad_trailing(mark, 8), :reset, name, check.text])
    if check.remedy, do: Mix.shell().info(String.duplicate(" ", 25) <> "-> " <> check.remedy)
    check.status
  end
end
