"""The typefaces of `glyphs`, by the names of Fontsource's packages.

All are under the SIL Open Font License 1.1 and have the 62 characters in 62 different shapes. Siblings, such as
fira-code and fira-mono, are on the same side.
"""

_TRAINED = """
abril-fatface acme actor alata albert-sans aldrich aleo alex-brush alexandria alfa-slab-one allan anonymous-pro
antonio arvo assistant atkinson-hyperlegible azeret-mono bad-script barlow-condensed basic be-vietnam-pro belleza
berkshire-swash besley black-ops-one blinker bodoni-moda brawler bree-serif bricolage-grotesque bubblegum-sans
caladea caprasimo cardo carter-one catamaran caveat caveat-brush chakra-petch changa chivo comfortaa comic-neue
commissioner cookie courgette courier-prime creepster crimson-pro crimson-text damion dancing-script
darker-grotesque delius didact-gothic dm-mono dm-sans dm-serif-display dm-serif-text domine dosis encode-sans
epilogue exo fahkwang faustina figtree fjalla-one fragment-mono fredoka gabarito gelasio gentium-book-plus geologica
germania-one gloria-hallelujah gochi-hand grand-hotel great-vibes halant handlee hanken-grotesk headland-one heebo
hepta-slab herr-von-muellerhoff ibm-plex-mono inconsolata inder indie-flower inika inknut-antiqua instrument-sans
instrument-serif italiana itim jost jura kalam kaushan-script khand knewave lato league-spartan lekton lexend
lexend-zetta libre-baskerville libre-caslon-text licorice lilita-one lobster lobster-two lustria manrope mansalva
marck-script martel merriweather-sans monda mr-de-haviland museomoderno neucha newsreader old-standard-tt orbitron
outfit ovo oxanium oxygen pacifico parisienne passion-one patua-one paytone-one philosopher pinyon-script play
playfair-display plus-jakarta-sans poiret-one poly prata press-start-2p pt-mono pt-sans pt-serif public-sans
quantico quattrocento quicksand rammetto-one red-hat-display red-hat-mono reenie-beanie righteous rokkitt rowdies
russo-one sacramento saira sanchez sansita schibsted-grotesk sen shadows-into-light share-tech-mono short-stack
signika slabo-13px smooch sniglet sora sorts-mill-goudy space-mono spicy-rice spline-sans sriracha suez-one syne
tangerine teko tenor-sans titan-one titillium-web tomorrow twinkle-star uncial-antiqua unna urbanist varela-round
vibur vt323 whisper yanone-kaffeesatz yantramanav yeseva-one yrsa zen-dots zilla-slab
"""
_HELD_OUT = """
abeezee abhaya-libre alice allura anton architects-daughter archivo archivo-black archivo-narrow arsenal asap
audiowide cabin cabin-sketch cantarell cedarville-cursive corinthia covered-by-your-grace esteban fira-code
fira-mono gloock goldman hind josefin-sans karla kode-mono krona-one londrina-solid marcellus maven-pro
overpass-mono patrick-hand questrial rajdhani recursive rufina sarabun sue-ellen-francisco unifrakturmaguntia
"""
TRAINED = tuple(_TRAINED.split())
HELD_OUT = tuple(_HELD_OUT.split())
