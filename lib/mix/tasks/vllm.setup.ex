defmodule Mix.Tasks.Vllm.Setup do
  @shortdoc "Installs vLLM into a virtual environment of this library's own"

  # What the extras are for that are none of a quantization method.
  @purposes %{
    "finetune" => "`mix vllm.finetune`",
    "matplotlib" =>
      "pictures: `--plot` of the tasks that have it, `VLLM.Bench.plot/2` and its like"
  }

  # What each lock of an extra holds.
  @extras Enum.map_join(VLLM.Python.extras(), "\n", fn extra ->
            @external_resource VLLM.Python.lock(extra)
            pins =
              Enum.map_join(VLLM.Python.pins(extra), ", ", &Enum.join(Tuple.to_list(&1), " "))

            purpose = @purposes[extra] || ~s(`quantization: "#{extra}"`)
            "| `#{extra}` | #{purpose} | #{pins} |"
          end)

  @moduledoc """
  Installs vLLM into a virtual environment of this library's own.

      mix vllm.setup [--with EXTRA,EXTRA] [--device cpu|cuda] [--venv FOLDER]
                     [--python PYTHON] [--force]

  Takes a few minutes and about 3.5 GB for the CPU, more for CUDA. Every package
  has the version that this release of the library was tested with. Run it again
  after an interruption, and after an upgrade of the library; where everything
  is in place it returns at once. A set-up that is killed takes its pip with it.

  The environment goes into the user's cache folder, into the folder that the
  variable VLLM_VENV names, or into `--venv`. The library looks in the first two.
  With `config :ex_vllm, python: "/path/to/python"` the library runs the Python
  of your choice, and this task is not needed.

  ## Extras

  Some quantization methods, fine-tuning and pictures need packages that vLLM does not bring:

      mix vllm.setup --with bitsandbytes,torchao

  | extra | for | brings |
  | --- | --- | --- |
  #{@extras}

  They are added to the environment that is there, in pinned versions, within a minute; ggml, of
  the extra `gguf`, is compiled for this machine's processor, with its C++ compiler. Every
  later `mix vllm.setup` keeps them; a new environment, such as that of another release of this
  library, has only what is asked for. `mix vllm.doctor` shows which of them are installed.

  ## Quantizing

  The libraries that quantize need other versions of the same packages than vLLM, so they have an
  environment of their own, beside it:

      mix vllm.setup --with quantize

  takes 2 GB, and a C++ compiler: llama.cpp, which makes GGUF files, is compiled for this machine's
  processor. Every later `mix vllm.setup` keeps it up to date. What quantizes computes on the CPU,
  also where vLLM has a GPU.

  ## Options

    * `--with` - extras and `quantize`, with commas between them; may be given more than once.
    * `--device` - `cpu` or `cuda`. Default: `cuda` where there is an NVIDIA
      driver, else `cpu`.
    * `--venv` - the folder for the environment.
    * `--python` - the Python to make it with. Default: `python3`, or the first of
      `python3.13`, `python3.12`, ... that vLLM runs on.
    * `--force` - makes the environment anew; that which quantizes only together with
      `--with quantize`.
    * `--test` - installs the tools for this library's own tests and all extras as well.
  """

  use Mix.Task

  alias VLLM.Python.Setup

  @requirements ["app.config"]

  @switches [
    with: :keep,
    device: :string,
    venv: :string,
    python: :string,
    force: :boolean,
    test: :boolean
  ]

  @impl Mix.Task
  def run(argv) do
    opts = parse!(argv)
    if opts[:venv] == nil, do: warn_of_config()
    install(opts)
  end

  @doc false
  @spec install([VLLM.Python.Setup.option()]) :: :ok
  def install(opts) do
    started = System.monotonic_time(:second)

    case Setup.run(opts, &report(&1, started)) do
      {:ok, :unchanged, venv} ->
        Mix.shell().info("vLLM is installed in #{venv}")

      {:ok, :installed, venv} ->
        report({:phase, "Done: vLLM is installed in #{venv}"}, started)

      {:error, error} ->
        clear_progress()
        Mix.shell().error(error.message)
        Enum.each(error.details["output"] || [], &Mix.shell().error("  | " <> &1))
        exit({:shutdown, 1})
    end
  end

  defp parse!(argv) do
    {opts, rest, invalid} = OptionParser.parse(argv, strict: @switches)

    case {rest, invalid} do
      {[], []} -> opts |> extras!() |> Keyword.replace_lazy(:device, &device!/1)
      {[word | _], _} -> Mix.raise("mix vllm.setup takes no argument #{inspect(word)}")
      {_, [{switch, _} | _]} -> Mix.raise("mix vllm.setup does not know #{switch} in this form")
    end
  end

  defp extras!(opts) do
    {names, opts} = Keyword.pop_values(opts, :with)
    extras = names |> Enum.flat_map(&String.split(&1, ",", trim: true)) |> Enum.map(&extra!/1)
    [{:with, extras} | opts]
  end

  defp extra!(name) do
    case VLLM.Python.extra(name) do
      {:ok, extra} -> extra
      {:error, error} -> Mix.raise(error.message)
    end
  end

  defp device!("cpu"), do: :cpu
  defp device!("cuda"), do: :cuda
  defp device!(other), do: Mix.raise("--device is cpu or cuda, not #{inspect(other)}")

  defp warn_of_config do
    with {:config, python} <- VLLM.Python.source() do
      Mix.shell().info(
        "Note: `config :ex_vllm, python: #{inspect(python)}` is set. The library runs that " <>
          "Python, not the environment that is set up here."
      )
    end
  end

  # In a terminal the progress within a phase stays on one line.
  defp report({:phase, text}, started) do
    clear_progress()
    Mix.shell().info("#{elapsed(started)} #{text}")
  end

  defp report({:progress, text}, started) do
    if IO.ANSI.enabled?() do
      IO.write("\r\e[K#{elapsed(started)}   #{text}")
    else
      Mix.shell().info("#{elapsed(started)}   #{text}")
    end
  end

  defp clear_progress, do: if(IO.ANSI.enabled?(), do: IO.write("\r\e[K"))

  defp elapsed(started) do
    seconds = System.monotonic_time(:second) - started
    minutes = seconds |> div(60) |> Integer.to_string() |> String.pad_leading(2)
    "#{minutes}:#{seconds |> rem(60) |> Integer.to_string() |> String.pad_leading(2, "0")}"
  end
end
